"""From (sum, weight) pairs on the device to the numbers of one line of the log."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxmodels.core.task import Metrics

OWN = ("grad_norm", "learning_rate")  # what the step adds to the metrics of the task


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a run had consumed when a step was started; two of them give rates.

    Attributes:
      step: updates, this one included.
      seconds: of training, pauses excluded.
      waited: seconds of those spent waiting for data.
      examples: rows.
      tokens: as `Placed.tokens` counts them.
      flops: as `count_flops` counts them.
      skipped: updates that were left out, see `train.finite`.
    """

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    examples: int = 0
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0


def mean_values(metrics: Metrics) -> dict[str, float]:
    """Fetches metrics, waiting for the step that makes them, and divides sums by weights.

    The loss comes first, the trainer's own two last: a jitted function gives them by alphabet.
    """
    fetched = jax.device_get(metrics)
    names = sorted(fetched, key=lambda name: (name in OWN, name != "loss"))
    return {name: divide(*fetched[name]) for name in names}


def divide(total: Any, weight: Any) -> float:
    """Returns total / weight; nan where nothing was weighed."""
    return float(total) / float(weight) if float(weight) else float("nan")


def rates(before: Counters, now: Counters, peak_flops: float | None) -> dict[str, float]:
    """Returns the speeds between two moments.

    Args:
      before: the earlier moment.
      now: the later one.
      peak_flops: FLOP/s of all devices together; None leaves `mfu` out.
    """
    seconds = max(now.seconds - before.seconds, 1e-9)
    steps = max(now.step - before.step, 1)
    values = {
        "examples_per_second": (now.examples - before.examples) / seconds,
        "tokens_per_second": (now.tokens - before.tokens) / seconds,
        "step_ms": 1e3 * seconds / steps,
        "data_wait": min((now.waited - before.waited) / seconds, 1.0),
    }
    if not now.tokens:
        del values["tokens_per_second"]
    if peak_flops:
        values["mfu"] = (now.flops - before.flops) / seconds / peak_flops
    return values


def add(
    totals: Mapping[str, tuple[float, float]], metrics: Metrics
) -> dict[str, tuple[float, float]]:
    """Returns totals plus fetched metrics, summed in Python's 64 bits."""
    sums = dict(totals)
    for name, (total, weight) in jax.device_get(metrics).items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + float(total), before[1] + float(weight)
    return sums
