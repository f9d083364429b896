"""The table of parameters that a run prints before it starts."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxmodels.core import params as params_lib
from jaxmodels.core.task import FROZEN
from train.state import Layout


def aligned(rows: Iterable[tuple[str, ...]], right: Iterable[int] = ()) -> str:
    """Returns rows of cells as lines, each column as wide as its widest cell.

    Args:
      rows: the first one is the heading and gets a rule below it.
      right: the columns aligned to the right (numbers).
    """
    rows, right = list(rows), set(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = (
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def parameter_table(plan: Layout) -> str:
    """Returns one line a parameter (path, shape, dtype, sharding, size, group), then the totals."""
    state = plan.abstract
    rows = [("parameter", "shape", "dtype", "sharding", "size", "group")]
    for path, leaf in sorted(params_lib.flatten(state.params).items()):
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        size = f"{math.prod(leaf.shape):,}"
        rows.append((path, shape, np.dtype(leaf.dtype).name, _spec(leaf), size, plan.groups[path]))
    total, trainable, frozen = map(params_lib.count, (state.params, state.trainable, state.frozen))
    groups = sorted({group for group in plan.groups.values() if group != FROZEN})
    per_device = bytes_per_device(state.params), bytes_per_device(state.opt_state)
    return "\n".join(
        (
            aligned(rows, right=(4,)),
            f"parameters: {total:,} = {trainable:,} trainable ({', '.join(groups)})"
            f" + {frozen:,} frozen",
            f"bytes a device: {_size(per_device[0])} parameters"
            f" + {_size(per_device[1])} optimiser state",
        )
    )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of `tree`: arrays or placed shape structs."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shards)


def _spec(leaf: Any) -> str:
    """The mesh axis of each axis that is split, as `(-, device)`; `repeated` where none is."""
    spec = tuple(leaf.sharding.spec)
    if not any(spec):
        return "repeated"
    names = ("+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec)
    return f"({', '.join(names)})"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
