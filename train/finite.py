"""Looks at the numbers of each step before anything is kept of it: no NaN reaches a checkpoint."""

import collections
import math
import statistics
from collections.abc import Sequence

import jax
import numpy as np

from train.errors import RunError

SPIKE = 100.0  # times the median of the last losses
_WINDOW, _LEAST = 100, 10  # losses that the median is of
_MOST_SKIPPED = 100  # updates skipped one after the other before the run ends


class FiniteCheck:
    """Checks the health vector of each step, in order.

    Attributes:
      skipped: updates that the step itself has left out.
    """

    def __init__(self, paths: Sequence[str], skips_nonfinite: bool, skipped: int = 0):
        """Takes the paths of the trainable leaves, in the order of the vector.

        Args:
          paths: see `step.make_train_step`.
          skips_nonfinite: whether the step leaves out updates that are not finite.
          skipped: updates left out by earlier parts of the run.
        """
        self.skipped = skipped
        self._paths = list(paths)
        self._skips = skips_nonfinite
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._in_a_row = 0

    def check(self, step: int, health: jax.Array) -> str | None:
        """Waits for a step and returns what is worth a line of the log, if anything.

        Args:
          step: its number.
          health: [2 + leaves] float32: the loss, 1 where the update was skipped, then the squared
            norm of each leaf's gradient.

        Raises:
          RunError: something is not finite and the step does not skip such updates, or too many
            were skipped one after the other.
        """
        found = np.asarray(jax.device_get(health))
        loss, left_out = float(found[0]), bool(found[1])
        fault = self._fault(found)
        if fault and not self._skips:
            raise RunError(
                f"step {step}: {fault}; the run stops and this step is in no checkpoint. Lower "
                "optimizer.learning_rate or optimizer.clip_norm, look at the data of this step, "
                "or leave such updates out with --config.on_nonfinite=skip (in a new workdir)"
            )
        self._in_a_row = self._in_a_row + 1 if left_out else 0
        if left_out:
            return self._skipped(step, fault or f"grad_norm {math.sqrt(found[2:].sum()):.4g}")
        return self._spike(step, loss)

    def _fault(self, found: np.ndarray) -> str | None:
        """What is not finite, by name: the loss and the first leaf whose gradient is not."""
        parts = [] if np.isfinite(found[0]) else [f"loss is {found[0]}"]
        bad = np.flatnonzero(~np.isfinite(found[2:]))
        if bad.size:
            more = f" (and {bad.size - 1} of {len(self._paths) - 1} others)" if bad.size > 1 else ""
            parts.append(f"the gradient of {self._paths[bad[0]]} is {found[2 + bad[0]]}{more}")
        return ", ".join(parts) or None

    def _skipped(self, step: int, reason: str) -> str:
        self.skipped += 1
        if self._in_a_row >= _MOST_SKIPPED:
            raise RunError(
                f"step {step}: {reason}; this was the {self._in_a_row}th update skipped in a row: "
                "nothing is learned any more. Lower optimizer.learning_rate or raise skip_grad_norm"
            )
        return f"step {step}: {reason}: update skipped, {self.skipped} in all"

    def _spike(self, step: int, loss: float) -> str | None:
        usual = statistics.median(self._losses) if len(self._losses) >= _LEAST else 0.0
        self._losses.append(loss)
        if usual > 0 and loss > SPIKE * usual:
            return (
                f"step {step}: loss {loss:.4g} is {loss / usual:,.0f} times the usual {usual:.4g}"
            )
        return None
