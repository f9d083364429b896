"""Runs a training command that signals itself at a chosen moment: the script of test_signals.py.

python -m tests.faults.interrupted MOMENT SIGNAL FLAGS...

MOMENT is `step:N` (step N is dispatched, its numbers are not read yet), `evaluate:N` (batch N of
all evaluations), `save:N` (save N has begun and its manifest is held back), `twice:N` (as save:N,
and a second signal follows while the run waits for the save).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from train import cli, main, metrics
from train.checkpoint import Checkpoints, manifest
from train.compiled import PerShape


def after(owner: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """Lets `action` follow call `number` of a function."""
    plain, calls = getattr(owner, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        result = plain(*arguments, **named)
        if len(calls) == number:
            action()
        return result

    setattr(owner, name, counted)


def arrange(moment: str, number: int, send: Callable[[], None]) -> None:
    """Puts the signal in its place."""
    save, write, calls = Checkpoints.save, manifest.write, []
    holds = moment in ("save", "twice")

    def save_and_wait(self: Checkpoints, *arguments: Any) -> None:
        calls.append(1)
        save(self, *arguments)
        if not holds or len(calls) < number:
            self.wait()  # which save was in time must not be left to chance

    def held_back(*arguments: Any, **named: Any) -> Any:
        if holds and len(calls) == number:
            time.sleep(30)  # the save is under way, and stays so
        return write(*arguments, **named)

    Checkpoints.save, manifest.write = save_and_wait, held_back
    if moment == "step":
        after(PerShape, "__call__", number, send)
    elif moment == "evaluate":
        after(metrics, "add", number, send)
    else:
        after(Checkpoints, "save", number, send)
    if moment == "twice":
        after(Checkpoints, "save", number, threading.Timer(1.0, send).start)


if __name__ == "__main__":
    moment, _, number = sys.argv[1].partition(":")
    signal_number = signal.Signals[sys.argv[2]]
    arrange(moment, int(number), lambda: os.kill(os.getpid(), signal_number))
    sys.argv[1:] = sys.argv[3:]
    cli.run(main.main)
