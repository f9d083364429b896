"""Closing blocks and two gradients on GPU, Hopper and later: Mosaic GPU kernels, a launch each.

XLA makes four to seven launches of each. A warpgroup takes a block and a slice of its width, keeps
its tokens in registers, reads every number once and writes it once. `refine` and `leave` are one
fusion in XLA already and `enter` runs once a model: those stay with XLA, in `reference`, as does
everything before Hopper.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.vip_compression import reference
from kernels_pallas.vip_compression.reference import (
    enter,
    enter_gradient,
    leave,
    leave_gradient,
    refine,
)

__all__ = [
    "enter",
    "enter_gradient",
    "leave",
    "leave_gradient",
    "refine",
    "refine_gradient",
    "supports",
    "write_back",
    "write_back_gradient",
]

THREADS = 128  # of a warpgroup
MOST_TOKENS = 128  # a block: a thread holds one number of each, or two
TOKENS_OF_TWO = 32

Body = Callable[..., None]


def supports(block_size: int, d_model: int) -> bool:
    """Returns whether blocks fit: at most 128 tokens, and a width that is a multiple of 128."""
    return block_size <= MOST_TOKENS and d_model % THREADS == 0


def write_back(
    coarse: jax.Array,
    difference: jax.Array,
    index: jax.Array,
    fine: jax.Array,
    mask: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.write_back`; C and D are updated in place."""
    size = mask.shape[2]

    def body(place: tuple, c_out: jax.Ref, d_out: jax.Ref, f: jax.Ref, m: jax.Ref) -> None:
        i, slot, row, w = place
        weights = [m[i, slot, t] for t in range(size)]
        tokens = [_load(f, i, slot, t, w) * weights[t] for t in range(size)]
        mean = sum(tokens[1:], tokens[0]) / (sum(weights[1:], weights[0]) + reference.MEAN_EPS)
        c_out[i, row, w] = mean.astype(c_out.dtype)
        for t in range(size):
            d_out[i, row, t, w] = (mean - tokens[t]).astype(d_out.dtype)

    banks, others = [coarse, difference], [fine, mask.astype(jnp.float32)]
    coarse, difference = _each_block(body, index, banks, others, [], interpret)
    return coarse, difference


def refine_gradient(
    coarse_bar: jax.Array,
    difference_bar: jax.Array,
    index: jax.Array,
    fine_bar: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.refine_gradient`; both cotangents are updated in place."""
    size = fine_bar.shape[2]

    def body(place: tuple, c_out: jax.Ref, d_out: jax.Ref, f: jax.Ref) -> None:
        i, slot, row, w = place
        tokens = [_load(f, i, slot, t, w) for t in range(size)]
        old = [_load(d_out, i, row, t, w) for t in range(size)]
        total = sum(tokens, _load(c_out, i, row, w))
        c_out[i, row, w] = total.astype(c_out.dtype)
        for t in range(size):
            d_out[i, row, t, w] = (old[t] - tokens[t]).astype(d_out.dtype)

    banks = [coarse_bar, difference_bar]
    coarse_bar, difference_bar = _each_block(body, index, banks, [fine_bar], [], interpret)
    return coarse_bar, difference_bar


def write_back_gradient(
    coarse_bar: jax.Array,
    difference_bar: jax.Array,
    index: jax.Array,
    mask: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `reference.write_back_gradient`; both cotangents are updated in place."""
    size = mask.shape[2]

    def body(place: tuple, c_out: jax.Ref, d_out: jax.Ref, f_out: jax.Ref, m: jax.Ref) -> None:
        i, slot, row, w = place
        weights = [m[i, slot, t] for t in range(size)]
        changes = [_load(d_out, i, row, t, w) for t in range(size)]
        total = sum(changes, _load(c_out, i, row, w))
        share = total / (sum(weights[1:], weights[0]) + reference.MEAN_EPS)
        c_out[i, row, w] = jnp.zeros_like(share, c_out.dtype)
        for t in range(size):
            f_out[i, slot, t, w] = (weights[t] * (share - changes[t])).astype(dtype)
            d_out[i, row, t, w] = jnp.zeros_like(share, d_out.dtype)

    fine = jax.ShapeDtypeStruct((*mask.shape, coarse_bar.shape[2]), dtype)
    banks, others = [coarse_bar, difference_bar], [mask.astype(jnp.float32)]
    coarse_bar, difference_bar, fine_bar = _each_block(
        body, index, banks, others, [fine], interpret
    )
    return coarse_bar, difference_bar, fine_bar


def _load(ref: jax.Ref, *at: jax.Array | int) -> jax.Array:
    return ref[at].astype(jnp.float32)


def _each_block(
    body: Body,
    index: jax.Array,
    banks: Sequence[jax.Array],
    others: Sequence[jax.Array],
    made: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `body` for each listed block and each slice of the width.

    Args:
      body: (place, banks, arrays made, other arrays) as references; the place is (example, slot of
        the list, row of the banks, slice of the width).
      index: [B, k].
      banks: C [B, m, d] and D [B, m, b, d], updated in place.
      others: that are read: [B, k, b, d] and [B, k, b].
      made: that are written.
      interpret: run on any platform.

    Returns:
      the banks and what is made.
    """
    d, size = banks[1].shape[3], banks[1].shape[2]
    wide = d % (2 * THREADS) == 0 and size <= TOKENS_OF_TWO
    width = 2 * THREADS if wide else THREADS

    def sliced(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], d // width, width) if shape[-1] == d else shape

    def kernel(*refs: jax.Ref) -> None:
        index_ref, given, targets = refs[len(banks)], refs[len(banks) + 1 :], refs[-results:]
        i, slot, w = (pl.program_id(axis) for axis in range(3))
        body((i, slot, index_ref[i, slot], w), *targets, *given[: len(others)])

    inputs = [x.reshape(sliced(x.shape)) for x in banks]
    inputs += [index, *(x if x.ndim == 3 else x.reshape(sliced(x.shape)) for x in others)]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[: len(banks)]]
    outputs += [jax.ShapeDtypeStruct(sliced(x.shape), x.dtype) for x in made]
    results = len(outputs)
    by_hand = pl.BlockSpec(memory_space=plgpu.GMEM)
    mode = dict(interpret=True) if interpret else dict(compiler_params=plgpu.CompilerParams())
    found = pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=(*index.shape, d // width),
        in_specs=[by_hand] * len(inputs),
        out_specs=[by_hand] * results,
        input_output_aliases={n: n for n in range(len(banks))},
        **mode,
    )(*inputs)
    wanted = [x.shape for x in (*banks, *made)]
    return [x.reshape(shape) for x, shape in zip(found, wanted, strict=True)]
