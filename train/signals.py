"""Turns SIGTERM and SIGINT into a wish to stop, granted between two steps and never inside one.

One process has handlers of its own. Where several train together, the preemption service of
`jax.distributed` takes SIGTERM on any of them and makes all agree on the same moment; SIGINT is
passed on to it.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM  # 143: schedulers take it for "start me again"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this run was asked to stop. A context: handlers are put back at its end.

    The first signal is noted; a second one leaves the process at once with status 143. Only the
    main thread of a process can take signals: elsewhere (a notebook's worker thread) the request
    never comes.

    Attributes:
      signal_name: name of the signal, once `reached` has told of it; None before.
    """

    def __init__(self) -> None:
        """Takes no signal yet."""
        self.signal_name: str | None = None
        self._noted: str | None = None
        self._moments = 0
        self._together = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # The service's own handler of SIGTERM lies below Python's: it must stay.
            taken = _SIGNALS[1:] if self._together else _SIGNALS
            for number in taken:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def reached(self) -> bool:
        """Whether to stop now. Every process calls it at the same moments: between steps."""
        if self.signal_name is not None:
            return True
        self._moments += 1
        if not self._together:
            self.signal_name = self._noted
        elif multihost_utils.reached_preemption_sync_point(self._moments):
            self.signal_name = self._noted or "SIGTERM or a preemption notice"
            self._leave_at_next_signal()
        return self.signal_name is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted is not None:
            _leave(number)
        self._noted = signal.Signals(number).name
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)

    def _leave_at_next_signal(self) -> None:
        """From the agreed moment on, the service has nothing more to say about SIGTERM."""
        self._noted = self.signal_name
        if self._before:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)


def _leave(number: int) -> None:
    """Ends the process at once. What is half written is a temporary folder: it is not a step."""
    name = signal.Signals(number).name
    os.write(2, f"\nsecond signal ({name}): leaving at once, unsaved steps are lost\n".encode())
    os._exit(EXIT_STATUS)
