"""Runs a task's evaluators: jitted sums over batches, divided once at the end."""

import contextlib
import time
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmodels.core.task import Task
from train import metrics as metrics_lib
from train.compiled import PerShape
from train.input import Prefetcher
from train.step import make_eval_step

Results = dict[str, dict[str, float]]


class Evaluation:
    """The evaluations of one task; compiled programs are kept from one run to the next."""

    def __init__(self, task: Task, mesh: Mesh):
        """Takes the evaluators of `task`; nothing is read or compiled yet."""
        self._mesh = mesh
        self._evaluators = task.evaluators()
        self._steps = {n: PerShape(make_eval_step(e, mesh)) for n, e in self._evaluators.items()}

    def run(self, params: Any) -> Results:
        """Returns {evaluator: {metric: value, "evaluation_seconds": time without compiling}}.

        Raises:
          RuntimeError: an evaluator's data set gave no batch.
        """
        return {name: self._run_one(name, params) for name in self._evaluators}

    def _run_one(self, name: str, params: Any) -> dict[str, float]:
        step, totals, waiting = self._steps[name], {}, None
        compiling, start = step.seconds, time.perf_counter()
        batches = Prefetcher(self._evaluators[name].dataset(), self._mesh)
        with contextlib.closing(batches), jax.transfer_guard("disallow"):
            for placed in batches:
                sums = step(params, placed.batch)
                totals = metrics_lib.add(totals, waiting or {})  # one batch late: no stop between
                waiting = sums
            totals = metrics_lib.add(totals, waiting or {})
        if not totals:
            raise RuntimeError(f"evaluator {name!r}: its data set gave no batch")
        values = {metric: metrics_lib.divide(*pair) for metric, pair in totals.items()}
        seconds = time.perf_counter() - start - (step.seconds - compiling)
        return values | {"evaluation_seconds": seconds}
