"""Where the wall time of a run goes: training, or one of the things that training stops for."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Clock:
    """Counts seconds of training, and apart from them the seconds of named pauses.

    Attributes:
      pauses: {"start": seconds, "compile": ..., "evaluate": ..., "save": ...}; those never entered
        are absent.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        pauses: Mapping[str, float] | None = None,
        began: float | None = None,
    ):
        """Starts counting, from what an earlier part of the run had counted already.

        Args:
          seconds: of training, of earlier parts.
          pauses: of earlier parts.
          began: a `time.perf_counter()` of the past; what lies between counts as `start`.
        """
        self.pauses = dict(pauses or {})
        self._before = seconds
        self._began = time.perf_counter()
        self._paused = 0.0
        if began is not None:
            self._add("start", self._began - began)

    @property
    def seconds(self) -> float:
        """Seconds of training so far: steps and waiting for data, without the pauses."""
        return self._before + time.perf_counter() - self._began - self._paused

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Counts what happens inside as `name`. Pauses do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._paused += spent
            self._add(name, spent)

    def _add(self, name: str, seconds: float) -> None:
        self.pauses[name] = self.pauses.get(name, 0.0) + seconds
