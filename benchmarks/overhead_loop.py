"""Times the steps of `train.loop` against the bare compiled step, in turn, inside one run.

After every block of the loop's own steps, all waited for, the same program runs as many times on a
state of its own and one repeated batch. So both sides meet the same minute of the machine, and the
loop is the one that users run: prefetching, logging, signals, watchdog, writers.
"""

import contextlib
import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs import fields as config_fields
from train import compiled, loop, run


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Seconds a step, one pair for each turn: of the loop, and of the bare step after it."""

    loop: tuple[float, ...]
    bare: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Loop over bare, a turn each."""
        return [own / bare for own, bare in zip(self.loop, self.bare, strict=True)]

    def __add__(self, other: "Blocks") -> "Blocks":
        return Blocks(self.loop + other.loop, self.bare + other.bare)

    def to_dict(self) -> dict[str, Any]:
        """Returns medians in ms, the median ratio with its quartiles, and every ratio."""
        ratios = self.ratios
        return {
            "loop_ms": 1e3 * float(np.median(self.loop)),
            "bare_ms": 1e3 * float(np.median(self.bare)),
            "ratio": float(np.median(ratios)),
            "lower": float(np.quantile(ratios, 0.25)),
            "upper": float(np.quantile(ratios, 0.75)),
            "turns": len(ratios),
            "ratios": ratios,
        }


class _Interleaved(compiled.PerShape):
    """The program of a run; between blocks of calls it runs by itself."""

    def __init__(self, function: Any, block: int, warmup: int):
        super().__init__(function)
        self.pairs: list[tuple[float, float]] = []
        self._block, self._warmup = block, warmup
        self._calls, self._turns = 0, 0
        self._began: float | None = None
        self._own: Any = None

    def __call__(self, first: Any, batch: Any) -> Any:
        if self._calls % self._block == 0:
            self._turn(first, batch)
        self._calls += 1
        return super().__call__(first, batch)

    def _turn(self, state: Any, batch: Any) -> None:
        jax.block_until_ready(state)
        loop_seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        if self._own is None:
            with jax.transfer_guard("allow"):
                self._own = jax.tree.map(jnp.copy, state), batch
        own, repeated = self._own
        start = time.perf_counter()
        for _ in range(self._block):
            own, *_ = super().__call__(own, repeated)
        jax.block_until_ready(own)
        bare_seconds = time.perf_counter() - start
        self._own = own, repeated
        self._turns += 1
        if self._turns > 1 + self._warmup:  # before the first turn the loop had no block
            self.pairs.append((loop_seconds / self._block, bare_seconds / self._block))
        self._began = time.perf_counter()


def measure_run(
    fields: config_fields.Fields,
    settings: Mapping[str, Any],
    workdir: Path,
    *,
    turns: int = 10,
    block: int = 20,
    warmup: int = 1,
) -> tuple[Blocks, str]:
    """Trains once in `workdir` and returns its blocks and its last line (the shares of time).

    Args:
      fields: of the config.
      settings: {dotted field: value}; `total_steps` follows from the turns.
      workdir: new; nothing is saved there before the end.
      turns: counted ones.
      block: steps a turn, of each side.
      warmup: turns before those.
    """
    steps = (turns + warmup) * block + 1
    config = config_fields.build(
        fields, {**settings, "total_steps": steps, "eval_every": 0, "checkpoint_every": 0}
    )
    made: list[_Interleaved] = []

    def per_shape(function: Any) -> _Interleaved:
        made.append(_Interleaved(function, block, warmup))
        return made[-1]

    said = io.StringIO()
    with mock.patch.object(run, "PerShape", per_shape), contextlib.redirect_stdout(said):
        loop.train(config, workdir, fields)
    own, bare = zip(*made[0].pairs, strict=True)
    return Blocks(own, bare), said.getvalue().splitlines()[-1]
