"""Runs a task's evaluators: jitted sums over batches, divided once at the end."""

import contextlib
import math
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmodels.core.task import Task
from train import metrics as metrics_lib
from train.compiled import PerShape
from train.errors import RunError
from train.input import Prefetcher
from train.step import make_eval_step

Results = dict[str, dict[str, float]]


class Evaluation:
    """The evaluations of one task; compiled programs are kept from one run to the next."""

    def __init__(self, task: Task, mesh: Mesh, timeout_seconds: float = 0):
        """Takes the evaluators of `task`; nothing is read or compiled yet.

        Args:
          task: what is evaluated.
          mesh: where batches go.
          timeout_seconds: without a batch, after which an evaluation fails; 0: never.
        """
        self._mesh = mesh
        self._timeout = timeout_seconds
        self._evaluators = task.evaluators()
        self._steps = {n: PerShape(make_eval_step(e, mesh)) for n, e in self._evaluators.items()}

    def run(
        self,
        params: Any,
        interrupted: Callable[[], bool] = lambda: False,
        failed: Callable[[str], None] | None = None,
    ) -> Results | None:
        """Returns {evaluator: {metric: value, "evaluation_seconds": time without compiling}}.

        Args:
          params: what to evaluate.
          interrupted: asked before each batch; once true, the evaluation ends with None.
          failed: takes what is wrong with an evaluator and lets the others go on; else it raises.

        Raises:
          RunError: an evaluator raised, gave a sum that is not finite, or had no batch.
        """
        results: Results = {}
        for name in self._evaluators:
            try:
                values = self._run_one(name, params, interrupted)
            except RunError as error:
                if failed is None:
                    raise
                failed(str(error))
                continue
            if values is None:
                return None
            results[name] = values
        return results

    def _run_one(
        self, name: str, params: Any, interrupted: Callable[[], bool]
    ) -> dict[str, float] | None:
        compiling, start = self._steps[name].seconds, time.perf_counter()
        try:
            totals = self._totals(name, params, interrupted)
        except RunError as error:
            raise RunError(f"evaluator {name!r}: {error}") from error
        except Exception as error:
            traceback.print_exc()  # the evaluator's own code is at fault: its author wants to see
            raise RunError(f"evaluator {name!r} failed: {type(error).__name__}: {error}") from error
        if totals is None:
            return None
        if not totals:
            raise RunError(f"evaluator {name!r}: its data set gave no batch")
        bad = [metric for metric, pair in totals.items() if not all(map(math.isfinite, pair))]
        if bad:
            raise RunError(
                f"evaluator {name!r}: {bad[0]} is {metrics_lib.divide(*totals[bad[0]])}; "
                "--config.on_evaluation_error=continue trains on all the same"
            )
        values = {metric: metrics_lib.divide(*pair) for metric, pair in totals.items()}
        seconds = time.perf_counter() - start - (self._steps[name].seconds - compiling)
        return values | {"evaluation_seconds": seconds}

    def _totals(
        self, name: str, params: Any, interrupted: Callable[[], bool]
    ) -> dict[str, tuple[float, float]] | None:
        """The sums over all batches; None where interrupted."""
        step, totals, waiting = self._steps[name], {}, None
        dataset = self._evaluators[name].dataset()
        batches = Prefetcher(dataset, self._mesh, timeout_seconds=self._timeout)
        with contextlib.closing(batches), jax.transfer_guard("disallow"):
            for placed in batches:
                if interrupted():
                    return None
                sums = step(params, placed.batch)
                totals = metrics_lib.add(totals, waiting or {})  # one batch late: no stop between
                waiting = sums
            return metrics_lib.add(totals, waiting or {})
