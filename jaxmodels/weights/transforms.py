"""Layout changes between foreign tensors and our leaves: invertible, bit-exact, mostly views.

Every transform only moves values; none computes with them, so a round trip keeps each bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout between a foreign tensor and one of our leaves.

    Attributes:
      name: for messages.
      forward: foreign array -> our array.
      backward: our array -> foreign array.
      source_shape: our shape -> the foreign shape it comes from; ValueError where there is none.
      target_shape: foreign shape -> our shape; ValueError where the transform does not apply.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]
    source_shape: Callable[[Shape], Shape]
    target_shape: Callable[[Shape], Shape]


IDENTITY = Transform("identity", lambda x: x, lambda x: x, tuple, tuple)
# PyTorch keeps Linear weights as [out, in]; ours are [in, out].
TRANSPOSE = Transform("transpose", np.transpose, np.transpose, lambda s: s[::-1], lambda s: s[::-1])


def permute(*axes: int) -> Transform:
    """Returns the transform under which axis k of our leaf is foreign axis `axes[k]`."""
    back = tuple(int(axis) for axis in np.argsort(axes))
    if sorted(axes) != list(range(len(axes))):
        raise ValueError(f"permute{axes}: name each axis from 0 to {len(axes) - 1} once.")

    def reorder(shape: Shape, order: tuple[int, ...]) -> Shape:
        _need_rank(shape, len(axes))
        return tuple(shape[axis] for axis in order)

    return Transform(
        f"permute{axes}",
        lambda x: np.transpose(x, axes),
        lambda x: np.transpose(x, back),
        lambda shape: reorder(shape, back),
        lambda shape: reorder(shape, axes),
    )


# PyTorch keeps convolution weights as [out, in, *window]; Flax wants [*window, in, out].
CONV_1D = permute(2, 1, 0)
CONV_2D = permute(2, 3, 1, 0)
CONV_3D = permute(2, 3, 4, 1, 0)


def squeeze(*axes: int) -> Transform:
    """Returns the transform that drops foreign axes of length 1, e.g. [1, 1, D] -> [D].

    Args:
      *axes: positions in the foreign tensor, from 0, in rising order.
    """

    def grow(shape: Shape) -> Shape:
        wide = list(shape)
        for axis in axes:
            wide.insert(axis, 1)
        return tuple(wide)

    def shrink(shape: Shape) -> Shape:
        if any(axis >= len(shape) or shape[axis] != 1 for axis in axes):
            raise ValueError(f"axes {axes} of a tensor of shape {shape} are not all of length 1")
        return tuple(size for axis, size in enumerate(shape) if axis not in axes)

    return Transform(
        f"squeeze{axes}",
        lambda x: np.squeeze(x, axes),
        lambda x: np.expand_dims(x, axes),
        grow,
        shrink,
    )


def merge_axes(axis: int, leading: int) -> Transform:
    """Returns the transform that joins foreign axes `axis` and `axis + 1` into one of ours.

    Flax keeps attention kernels as [D, heads, width]; ours are [D, heads * width]:
    `merge_axes(1, leading=heads)`.

    Args:
      axis: of our leaf, which takes the joined place.
      leading: length of the first of the two foreign axes.
    """

    def merge(shape: Shape) -> Shape:
        if len(shape) < axis + 2 or shape[axis] != leading:
            raise ValueError(f"axis {axis} of a tensor of shape {shape} should have {leading}")
        return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])

    def split(shape: Shape) -> Shape:
        if len(shape) <= axis or shape[axis] % leading:
            raise ValueError(f"axis {axis} of shape {shape} is not a multiple of {leading}")
        return (*shape[:axis], leading, shape[axis] // leading, *shape[axis + 1 :])

    return Transform(
        f"merge_axes({axis}, {leading})",
        lambda x: x.reshape(merge(x.shape)),
        lambda x: x.reshape(split(x.shape)),
        split,
        merge,
    )


def chain(*steps: Transform) -> Transform:
    """Returns the transform that applies `steps` from the foreign tensor on, first to last."""

    def through(functions: list[Callable]) -> Callable:
        def run(value):  # noqa: ANN001, ANN202 - an array or a shape, as the functions take
            for function in functions:
                value = function(value)
            return value

        return run

    return Transform(
        " + ".join(step.name for step in steps),
        through([step.forward for step in steps]),
        through([step.backward for step in reversed(steps)]),
        through([step.source_shape for step in reversed(steps)]),
        through([step.target_shape for step in steps]),
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Which piece of a packed foreign tensor one of our leaves is.

    Attributes:
      index: of the piece.
      shares: relative sizes of all pieces, in order: (1, 1, 1) for query, key, value; (4, 1, 1)
        where four query heads share a key head.
      axis: of the foreign tensor, along which the pieces lie.
    """

    index: int
    shares: tuple[int, ...] = (1, 1, 1)
    axis: int = 0

    def __post_init__(self) -> None:
        """Checks that the piece exists."""
        if not 0 <= self.index < len(self.shares) or min(self.shares) < 1 or self.axis < 0:
            raise ValueError(f"{self}: index one of {len(self.shares)} shares, each at least 1.")

    def take(self, packed: np.ndarray) -> np.ndarray:
        """Returns our piece of the foreign tensor, a view."""
        unit = packed.shape[self.axis] // sum(self.shares)
        start = unit * sum(self.shares[: self.index])
        stop = start + unit * self.shares[self.index]
        return packed[(slice(None),) * self.axis + (slice(start, stop),)]

    def packed_shape(self, shape: Shape) -> Shape:
        """Returns the shape of the foreign tensor whose piece has `shape`."""
        return self._scaled(shape, sum(self.shares), self.shares[self.index])

    def piece_shape(self, shape: Shape) -> Shape:
        """Returns the shape of our piece of a foreign tensor of `shape`."""
        return self._scaled(shape, self.shares[self.index], sum(self.shares))

    def _scaled(self, shape: Shape, times: int, over: int) -> Shape:
        if len(shape) <= self.axis or shape[self.axis] % over:
            raise ValueError(f"axis {self.axis} of shape {shape} does not divide into {over}")
        size = shape[self.axis] // over * times
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])


def _need_rank(shape: Shape, rank: int) -> None:
    if len(shape) != rank:
        raise ValueError(f"a tensor of shape {shape} where {rank} axes are needed")
