"""One process of a run at whose bidding something happens to it: `train.main` with more flags.

python -m tests.multiprocess.member FLAGS... [--slow=SECONDS] [--hold=SAVE] [--signal=AT:SIGNAL]

--slow: each step takes SECONDS longer.
--hold: from that save on, no manifest is written for a minute: the save stays under way.
--signal: SIGNAL is sent to this process AT `compile`, `step-N` (dispatched, not read yet) or
  `save-N` (begun), and this process then stays there for long enough that all have heard of it;
  AT `stopping`: half a second after the processes have agreed to stop. The flag may be repeated.

Nothing here changes which collectives a process takes part in.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

from tests.faults.interrupted import after
from train import cli, main
from train.checkpoint import Checkpoints, manifest
from train.compiled import PerShape
from train.signals import StopRequest

_NOTICED = 2.5  # seconds; the preemption service looks for a signal once a second


def slow_down(seconds: float) -> None:
    """Lets each step take longer on the host."""
    plain = PerShape.__call__

    def call(self: PerShape, *arguments: Any) -> Any:
        time.sleep(seconds)
        return plain(self, *arguments)

    PerShape.__call__ = call


def hold_manifests(number: int) -> None:
    """Keeps save `number` and those after it from being completed."""
    plain, written = manifest.write, []

    def write(*arguments: Any, **named: Any) -> Any:
        written.append(1)
        if len(written) >= number:
            time.sleep(60)
        return plain(*arguments, **named)

    manifest.write = write


def arrange(order: str) -> None:
    """Puts a signal in its place."""
    moment, _, name = order.partition(":")
    number_of_signal = signal.Signals[name]

    def send() -> None:
        os.kill(os.getpid(), number_of_signal)

    def send_and_stay() -> None:
        send()
        time.sleep(_NOTICED)

    moment, _, number = moment.partition("-")
    if moment == "stopping":
        reached = StopRequest.reached

        def agreed(self: StopRequest) -> bool:
            before = self.signal_name
            answer = reached(self)
            if answer and before is None:
                threading.Timer(0.5, send).start()
            return answer

        StopRequest.reached = agreed
    else:
        places = {
            "compile": (PerShape, "prepare"),
            "step": (PerShape, "__call__"),
            "save": (Checkpoints, "save"),
        }
        after(*places[moment], int(number or 1), send_and_stay)


def take(name: str) -> list[str]:
    """Takes --NAME=VALUE out of the command line."""
    found = [word for word in sys.argv if word.startswith(f"--{name}=")]
    sys.argv[:] = [word for word in sys.argv if word not in found]
    return [word.split("=", 1)[1] for word in found]


if __name__ == "__main__":
    for seconds in take("slow"):
        slow_down(float(seconds))
    for number in take("hold"):
        hold_manifests(int(number))
    for order in take("signal"):
        arrange(order)
    cli.run(main.main)
