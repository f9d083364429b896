"""Runs a training command that signals itself at a chosen moment: the script of test_signals.py.

python -m tests.faults.interrupted MOMENT SIGNAL FLAGS...

MOMENT is `step:N` (step N is dispatched, its numbers are not read yet), `evaluate:N` (batch N of
all evaluations), `save:N` (save N has begun and its manifest is held back), `twice:N` (as save:N,
a second signal follows once the run waits for the save).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from train import cli, main, manifest, metrics
from train.checkpoint import Checkpoints
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
    if moment in ("step", "evaluate"):
        save = Checkpoints.save

        def save_and_wait(self: Checkpoints, *arguments: Any) -> None:
            save(self, *arguments)
            self.wait()  # which save was in time must not be left to chance

        Checkpoints.save = save_and_wait
        owner, name = (PerShape, "__call__") if moment == "step" else (metrics, "add")
        after(owner, name, number, send)
    elif moment in ("save", "twice"):
        plain, held = manifest.write, threading.Event()

        def write(*arguments: Any, **named: Any) -> Any:
            if held.is_set():
                time.sleep(30)  # the save is under way, and stays so
            return plain(*arguments, **named)

        manifest.write = write
        after(Checkpoints, "save", number - 1, held.set) if number > 1 else held.set()
        after(Checkpoints, "save", number, send)
        if moment == "twice":
            wait = Checkpoints.wait

            def interrupted(self: Checkpoints) -> Any:
                threading.Timer(0.5, send).start()
                return wait(self)

            Checkpoints.wait = interrupted


if __name__ == "__main__":
    moment, _, number = sys.argv[1].partition(":")
    signal_number = signal.Signals[sys.argv[2]]
    arrange(moment, int(number), lambda: os.kill(os.getpid(), signal_number))
    sys.argv[1:] = sys.argv[3:]
    cli.run(main.main)
