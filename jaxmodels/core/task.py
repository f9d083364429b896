"""The contract between a method and the trainer: all that `train` knows of a method."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

Params = Any  # nested dict of arrays
Labels = Any  # the same nesting, one string a leaf
Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

FROZEN = "frozen"  # the one label with a meaning: no gradient, no optimiser state


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One evaluation: a finite data set and the numbers to sum over it.

    Attributes:
      dataset: called once an evaluation; yields numpy batches of one static shape. A batch holds
        `weight` [batch] float32, 0 on the rows that only pad the last batch.
      metrics: pure function (params, batch) -> {name: (weighted sum, weight)}; the trainer jits
        it, adds sums and weights over batches, devices and hosts, and divides once at the end.
    """

    dataset: Callable[[], Any]
    metrics: Callable[[Params, Batch], Metrics]


class Task(abc.ABC):
    """What one method asks of the trainer. Every method of it is pure but `datasets`.

    `jaxmodels/<method>/task.py` offers `make_task(config) -> Task`, which raises ValueError on
    settings that cannot work, before anything is compiled.
    """

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> Params:
        """Returns fresh parameters, boxed with their logical axis names.

        The trainer calls it under `jax.eval_shape` first, then jitted with output shardings.
        """

    @abc.abstractmethod
    def param_groups(self, params: Params) -> Labels:
        """Returns a label a leaf: `"frozen"` or the name of an optimiser group.

        The groups `"decay"` and `"no_decay"` exist always: with and without weight decay.
        """

    @abc.abstractmethod
    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the mean objective and metrics as (weighted sum, weight) pairs.

        The metrics hold `"loss"`; its weight says how much this batch counts beside the others
        of the same step (micro-batches), so that accumulation is exact.
        """

    @abc.abstractmethod
    def datasets(self, split: str) -> Any:
        """Returns a grain data set of numpy batches: this process's share of each global batch."""

    def check_mesh(self, mesh: Mesh) -> list[str]:
        """Returns lines on how training runs on `mesh`, for the log; none unless overridden.

        The trainer calls it before anything is compiled.

        Raises:
          ValueError: training cannot run there, or would run in a way that nobody can want.
        """
        return []

    def evaluators(self) -> dict[str, Evaluator]:
        """Returns the evaluations by name; none unless overridden."""
        return {}

    def predict(self, params: Params, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns one output a row of `inputs`; what `train.predict` and notebooks call."""
        raise ValueError(f"{type(self).__name__} has nothing to predict from {len(inputs)} rows.")
