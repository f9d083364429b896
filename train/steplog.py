"""Reads the metrics of a step after the next one has started, and turns them into log lines."""

import dataclasses

import jax

from jaxmodels.core.task import Metrics
from train import metrics as metrics_lib
from train.clock import Clock
from train.errors import RunError
from train.finite import FiniteCheck
from train.input import Placed
from train.metrics import Counters
from train.writers import TRAIN, Writers


@dataclasses.dataclass(frozen=True)
class _Started:
    counters: Counters
    metrics: Metrics
    health: jax.Array
    logged: bool


class StepLog:
    """The log of a run's steps, and the check of each step's numbers.

    A line holds the values of its own step, not of the steps since the line before, so that a run
    continued from any checkpoint writes the same lines as one never stopped; only its rates are
    over the steps in between.

    Attributes:
      counters: what has been consumed by the steps started so far.
    """

    def __init__(
        self,
        writers: Writers,
        clock: Clock,
        finite: FiniteCheck,
        peak_flops: float | None,
        counters: Counters,
    ):
        """Starts after what `counters` counts.

        Args:
          writers: where lines go.
          clock: of the run.
          finite: sees the health of every step, in order.
          peak_flops: FLOP/s of all devices together, where known.
          counters: of the run so far.
        """
        self.counters = counters
        self._writers = writers
        self._clock = clock
        self._finite = finite
        self._peak = peak_flops
        self._waiting: _Started | None = None
        self._last_line = dataclasses.replace(counters, seconds=clock.seconds)
        self._waited = 0.0

    def started(
        self, outputs: tuple[Metrics, jax.Array], placed: Placed, flops: int, logged: bool
    ) -> None:
        """Takes note of a step just dispatched, then waits for the one before it: two in flight.

        Args:
          outputs: the step's metrics and health.
          placed: its batch.
          flops: of the step.
          logged: whether it gets a line.

        Raises:
          RunError: the step before was not finite; its line is written.
        """
        now = self.counters
        self.counters = dataclasses.replace(
            now,
            step=now.step + 1,
            examples=now.examples + placed.examples,
            tokens=now.tokens + placed.tokens,
            flops=now.flops + flops,
        )
        before, self._waiting = self._waiting, _Started(self.counters, *outputs, logged)
        if before is not None:
            self._finish(before)

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self.counters = dataclasses.replace(self.counters, waited=self.counters.waited + seconds)

    def flush(self) -> None:
        """Waits for every step started; after it the device is idle and all numbers are checked.

        Raises:
          RunError: the last step was not finite; its line is written.
        """
        before, self._waiting = self._waiting, None
        if before is not None:
            self._finish(before)

    def _finish(self, started: _Started) -> None:
        try:
            note = self._finite.check(started.counters.step, started.health)
        except RunError:
            self._waiting = None  # what came after it is not worth looking at
            self._write(started)
            raise
        if started.logged:
            self._write(started)
        if note:
            self._writers.say(note)
        if self.counters.skipped != self._finite.skipped:
            self.counters = dataclasses.replace(self.counters, skipped=self._finite.skipped)

    def _write(self, started: _Started) -> None:
        values = metrics_lib.mean_values(started.metrics)
        now = dataclasses.replace(
            started.counters, seconds=self._clock.seconds, waited=self.counters.waited
        )
        values |= metrics_lib.rates(self._last_line, now, self._peak)
        values["seconds"] = now.seconds
        values["compile_seconds"] = self._clock.pauses.get("compile", 0.0)
        self._writers.write(now.step, TRAIN, values)
        self._last_line = now
