"""Ends a run that hangs: a lost peer, a stuck disk or a deadlock must not burn paid hours."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable


class Watchdog:
    """A thread that waits for `beat()`; a context. Silence prints every stack and exits with 1.

    It works while the main thread is stuck in a collective or in storage, as those release the
    interpreter. Each process has its own, so a hang of all prints the stacks of all.
    """

    def __init__(self, seconds: float, describe: Callable[[], str] = str):
        """Takes the longest silence in seconds (0: none is too long) and what was being done."""
        self._seconds = seconds
        self._describe = describe
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds:
            self._thread.join()

    def beat(self) -> None:
        """Says that something was finished: a step, a batch of evaluation, a compilation."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while True:
            left = self._last + self._seconds - time.monotonic()
            if left <= 0:
                self._end()
            if self._ended.wait(min(left, 5.0)):
                return

    def _end(self) -> None:
        text = (
            f"error: no progress for {self._seconds:g} s ({self._describe()}): the stacks of all "
            "threads follow; the same command continues from the last checkpoint "
            "(--config.watchdog_seconds changes the limit)"
        )
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(1)
