"""Dispatch and combine as Pallas TPU kernels: one row copy each, a block of them in flight.

A kernel moves words of 32 bits: a row of bfloat16 is viewed as half as many words, because a
memory of packed 16-bit values cannot be addressed by the row. Rows stay in HBM; each step of the
grid starts the copies of a block of rows into VMEM, then waits for them, then scales them.

Inside `jax.shard_map` these need check_vma=False: a kernel does not say over which axes it varies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128  # rows in flight; a row is a few KiB, so that a block is well below VMEM's 16 MiB
LANES = 128  # words of a row come in multiples of it


def supported(x: jax.Array) -> str:
    """Returns "" where the kernels take rows like x's, else why they do not."""
    if x.ndim != 2 or x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows of {x.dtype}{list(x.shape)}: two axes of float32 or bfloat16 are needed"
    if x.shape[1] * x.dtype.itemsize % (4 * LANES):
        return f"rows of {x.shape[1]} {x.dtype} are no multiple of {LANES} words of 32 bits"
    return ""


def take_rows(x: jax.Array, index: jax.Array, *, interpret: bool = False) -> jax.Array:
    """See `reference.take_rows`."""
    return _unpacked(_gather(_packed(x), index, None, False, interpret), x.dtype)


def combine(
    x: jax.Array, index: jax.Array, gate: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `reference.combine`."""
    pairs = x.dtype == jnp.bfloat16
    return _unpacked(_gather(_packed(x), index, gate, pairs, interpret), x.dtype)


def _packed(x: jax.Array) -> jax.Array:
    """[rows, d] as uint32 words [rows, w]; of two 16-bit values the first is the low half."""
    if x.dtype.itemsize == 2:
        x = x.reshape(x.shape[0], -1, 2)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _unpacked(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, dtype).reshape(words.shape[0], -1)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _gather(
    words: jax.Array, index: jax.Array, gate: jax.Array | None, pairs: bool, interpret: bool
) -> jax.Array:
    rows, wanted = words.shape[0], index.shape[0]
    blocks = -(-wanted // BLOCK)
    missing = blocks * BLOCK - wanted
    index = jnp.where((index >= 0) & (index < rows), index, -1)
    index = jnp.pad(index, (0, missing), constant_values=-1).reshape(blocks, 1, BLOCK)
    operands = [index, words]
    specs = [
        pl.BlockSpec((1, 1, BLOCK), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    if gate is not None:
        # An empty place is zero whatever its gate, which may be NaN.
        gate = jnp.where(index.reshape(-1)[:wanted] >= 0, gate.astype(jnp.float32), 0)
        operands.append(jnp.pad(gate, (0, missing))[:, None])
        specs.append(pl.BlockSpec((BLOCK, 1), lambda i: (i, 0)))
    width = words.shape[1]
    out = pl.pallas_call(
        functools.partial(_kernel, gate is not None, pairs),
        grid=(blocks,),
        in_specs=specs,
        out_specs=pl.BlockSpec((BLOCK, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((blocks * BLOCK, width), jnp.uint32),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=interpret,
    )(*operands)
    return out[:wanted]


def _kernel(gated: bool, pairs: bool, index, words, *rest) -> None:
    gate = rest[0] if gated else None
    out, semaphore = rest[-2:]
    out[...] = jnp.zeros_like(out)

    def copy(r: jax.Array, row: jax.Array) -> Any:
        return pltpu.make_async_copy(words.at[pl.ds(row, 1)], out.at[pl.ds(r, 1)], semaphore)

    def start(r: jax.Array, _: None) -> None:
        row = index[0, 0, r]

        @pl.when(row >= 0)
        def _start() -> None:
            copy(r, row).start()

    def wait(r: jax.Array, _: None) -> None:
        row = index[0, 0, r]

        @pl.when(row >= 0)
        def _wait() -> None:
            copy(r, row).wait()

    jax.lax.fori_loop(0, BLOCK, start, None)
    jax.lax.fori_loop(0, BLOCK, wait, None)
    if gated:
        out[...] = _scaled(out[...], gate[...], pairs)


def _scaled(words: jax.Array, gate: jax.Array, pairs: bool) -> jax.Array:
    """Words times the gates of their rows; `pairs`: each word holds two bfloat16 values."""

    def bits(x: jax.Array) -> jax.Array:
        return pltpu.bitcast(x, jnp.uint32)

    def value(x: jax.Array) -> jax.Array:
        return pltpu.bitcast(x, jnp.float32)

    if not pairs:
        return bits(value(words) * gate)
    high = jnp.uint32(0xFFFF0000)

    def rounded(x: jax.Array) -> jax.Array:
        return bits((x * gate).astype(jnp.bfloat16).astype(jnp.float32))

    low_half = rounded(value(words << 16)) >> 16
    return low_half | (rounded(value(words & high)) & high)
