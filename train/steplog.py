"""Reads the metrics of a step after the next one has started, and turns them into log lines."""

import dataclasses

from jaxmodels.core.task import Metrics
from train import metrics as metrics_lib
from train.clock import Clock
from train.input import Placed
from train.metrics import Counters
from train.writers import TRAIN, Writers


@dataclasses.dataclass(frozen=True)
class _Started:
    counters: Counters
    metrics: Metrics
    logged: bool


class StepLog:
    """The log of a run's steps.

    A line holds the values of its own step, not of the steps since the line before, so that a run
    continued from any checkpoint writes the same lines as one never stopped; only its rates are
    over the steps in between.

    Attributes:
      counters: what has been consumed by the steps started so far.
    """

    def __init__(
        self, writers: Writers, clock: Clock, peak_flops: float | None, counters: Counters
    ):
        """Starts after what `counters` counts.

        Args:
          writers: where lines go.
          clock: of the run.
          peak_flops: FLOP/s of all devices together, where known.
          counters: of the run so far.
        """
        self.counters = counters
        self._writers = writers
        self._clock = clock
        self._peak = peak_flops
        self._waiting: _Started | None = None
        self._last_line = dataclasses.replace(counters, seconds=clock.seconds)
        self._waited = 0.0

    def started(self, metrics: Metrics, placed: Placed, flops: int, logged: bool) -> None:
        """Takes note of a step just dispatched, then waits for the one before it: two in flight."""
        now = self.counters
        self.counters = dataclasses.replace(
            now,
            step=now.step + 1,
            examples=now.examples + placed.examples,
            tokens=now.tokens + placed.tokens,
            flops=now.flops + flops,
        )
        before, self._waiting = self._waiting, _Started(self.counters, metrics, logged)
        if before is not None:
            self._finish(before)

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self.counters = dataclasses.replace(self.counters, waited=self.counters.waited + seconds)

    def flush(self) -> None:
        """Waits for every step started; after it the device is idle."""
        before, self._waiting = self._waiting, None
        if before is not None:
            self._finish(before)

    def _finish(self, started: _Started) -> None:
        if not started.logged:
            started.metrics["loss"][0].block_until_ready()
            return
        values = metrics_lib.mean_values(started.metrics)
        now = dataclasses.replace(
            started.counters, seconds=self._clock.seconds, waited=self.counters.waited
        )
        values |= metrics_lib.rates(self._last_line, now, self._peak)
        values["seconds"] = now.seconds
        values["compile_seconds"] = self._clock.pauses.get("compile", 0.0)
        self._writers.write(now.step, TRAIN, values)
        self._last_line = now
