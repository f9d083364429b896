"""Opening and closing blocks on TPU: Mosaic kernels that touch the listed blocks and nothing else.

The banks stay in HBM and are updated in place (`input_output_aliases`); `tpu_visit` brings their
blocks. Entering and leaving pass over all blocks in tiles.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.vip_compression import reference
from kernels_pallas.vip_compression.tpu_visit import Math, Operand, like, to_column, visit

LANES, SUBLANES = 128, 8
DENSE_TILE_BYTES = 1024 * 1024  # of a tile that passes over all blocks


def supports(block_size: int, d_model: int) -> bool:
    """Returns whether blocks are whole tiles of the hardware: b a multiple of 8, d of 128."""
    return block_size % SUBLANES == 0 and d_model % LANES == 0


def refine(
    coarse: jax.Array, difference: jax.Array, index: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `reference.refine`."""
    shape = (*index.shape, *difference.shape[2:])
    out = Operand(shape, reference.token_dtype(coarse, difference), "slot")

    def math(c: jax.Array, change: jax.Array) -> tuple[jax.Array]:
        return (reference.decompress(c, change),)

    banks = [_rows(coarse, index), (difference, "index")]
    return visit(math, index, None, banks, [(out, None)], interpret)[0]


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
    lent = [(coarse, "")] if coarse.dtype == jnp.float32 else []
    inputs = [*lent, (difference, ""), (fine, "slot")]
    outputs = [_new_rows(coarse, index), (like(difference), len(lent))]
    rows, difference = visit(reference.compress, index, mask, inputs, outputs, interpret)
    return _put_rows(coarse, index, rows), difference


def refine_gradient(
    coarse_bar: jax.Array,
    difference_bar: jax.Array,
    index: jax.Array,
    fine_bar: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.refine_gradient`; both cotangents are updated in place."""

    def math(c: jax.Array, change: jax.Array, fine: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, change, fine = (x.astype(jnp.float32) for x in (c, change, fine))
        return c + fine.sum(axis=0, keepdims=True), change - fine

    inputs = [_rows(coarse_bar, index), (difference_bar, "index"), (fine_bar, "slot")]
    outputs = [_new_rows(coarse_bar, index), (like(difference_bar), 1)]
    rows, difference_bar = visit(math, index, None, inputs, outputs, interpret)
    return _put_rows(coarse_bar, index, rows), difference_bar


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

    def math(c: jax.Array, change: jax.Array, column: jax.Array) -> tuple[jax.Array, ...]:
        fine = reference.compress_gradient(c, change, column)
        return jnp.zeros(c.shape, jnp.float32), jnp.zeros(change.shape, jnp.float32), fine

    fine = Operand((*index.shape, *difference_bar.shape[2:]), jnp.dtype(dtype), "slot")
    inputs = [_rows(coarse_bar, index), (difference_bar, "index")]
    outputs = [_new_rows(coarse_bar, index), (like(difference_bar), 1), (fine, None)]
    rows, difference_bar, fine_bar = visit(math, index, mask, inputs, outputs, interpret)
    return _put_rows(coarse_bar, index, rows), difference_bar, fine_bar


def enter(
    tokens: jax.Array, mask: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `reference.enter`: one pass, tokens are read once and differences written once."""
    batch, blocks, _, d = tokens.shape
    coarse = jax.ShapeDtypeStruct((batch, blocks, d), tokens.dtype)
    out = [coarse, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)]
    return tuple(_pass(reference.compress, mask, [tokens], out, interpret))


def enter_gradient(
    coarse_bar: jax.Array, difference_bar: jax.Array, mask: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Gradient of `enter`: `reference.compress_gradient` of every block, in the dtype of gD."""
    out = [jax.ShapeDtypeStruct(difference_bar.shape, difference_bar.dtype)]

    def math(c: jax.Array, change: jax.Array, column: jax.Array) -> tuple[jax.Array]:
        return (reference.compress_gradient(c, change, column),)

    return _pass(math, mask, [coarse_bar, difference_bar], out, interpret)[0]


def leave(
    coarse: jax.Array, difference: jax.Array, mask: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """See `reference.leave`."""
    dtype = reference.token_dtype(coarse, difference)

    def math(c: jax.Array, change: jax.Array, column: jax.Array) -> tuple[jax.Array]:
        return (reference.decompress(c, change) * column,)

    out = [jax.ShapeDtypeStruct(difference.shape, dtype)]
    return _pass(math, mask, [coarse, difference], out, interpret)[0]


def leave_gradient(
    tokens_bar: jax.Array,
    mask: jax.Array,
    dtypes: tuple[jnp.dtype, jnp.dtype],
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of `leave`: gC = sum_i g_i M_i and gD = -g M, in `dtypes`."""
    batch, blocks, _, d = tokens_bar.shape

    def math(tokens: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        masked = tokens.astype(jnp.float32) * column
        return masked.sum(axis=0, keepdims=True), -masked

    coarse = jax.ShapeDtypeStruct((batch, blocks, d), dtypes[0])
    out = [coarse, jax.ShapeDtypeStruct(tokens_bar.shape, dtypes[1])]
    return tuple(_pass(math, mask, [tokens_bar], out, interpret))


# A row of C [B, m, d] can be copied by itself where it is float32. Rows of bfloat16 are packed in
# pairs: XLA gathers and scatters those, k of them, before and after the kernel.
def _rows(coarse: jax.Array, index: jax.Array) -> tuple[jax.Array, str]:
    """An input with the rows of C, and where row s of the list is in it."""
    if coarse.dtype == jnp.float32:
        return coarse, "index"
    return reference.take(coarse, index).astype(jnp.float32), "slot"


def _new_rows(coarse: jax.Array, index: jax.Array) -> tuple[Operand, int | None]:
    """The output for new rows of C, and the input that it overwrites."""
    if coarse.dtype == jnp.float32:
        return like(coarse), 0
    shape = (*index.shape, coarse.shape[2])
    return Operand(shape, jnp.dtype(jnp.float32), "slot"), None


def _put_rows(coarse: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """C with what the kernel made of `_new_rows`."""
    return rows if coarse.dtype == jnp.float32 else reference.put(coarse, index, rows)


def _pass(
    math: Math,
    mask: jax.Array,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `math` on every block: arrays [B, m, b, d] and [B, m, d], M [B, m, b]."""
    batch, blocks, size = mask.shape
    d = inputs[0].shape[-1]
    rows = min(blocks, SUBLANES)
    width = next(
        d // parts
        for parts in range(1, d // LANES + 1)
        if d % (parts * LANES) == 0
        and (rows * size * (d // parts) * 4 <= DENSE_TILE_BYTES or d // parts == LANES)
    )

    def spec(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if len(array.shape) == 4:
            return pl.BlockSpec((1, rows, size, width), lambda i, j, w: (i, j, 0, w))
        return pl.BlockSpec((1, rows, width), lambda i, j, w: (i, j, w))

    def kernel(mask_ref: jax.Ref, *refs: jax.Ref) -> None:
        sources, targets = refs[: len(inputs)], refs[len(inputs) :]
        found: list[list[jax.Array]] = [[] for _ in targets]
        for t in range(rows):
            given = [r[0, t] if len(r.shape) == 4 else r[0, pl.ds(t, 1)] for r in sources]
            made = math(*given, to_column(mask_ref[0, pl.ds(t, 1)]))
            for target, block, kept in zip(targets, made, found, strict=True):
                if len(target.shape) == 4:
                    target[0, t] = block.astype(target.dtype)
                else:
                    kept.append(block)
        for target, kept in zip(targets, found, strict=True):
            if kept:  # one row at a time would be a masked store each
                target[0] = jnp.concatenate(kept, axis=0).astype(target.dtype)

    return pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(blocks, rows), d // width),
        in_specs=[pl.BlockSpec((1, rows, size), lambda i, j, w: (i, j, 0)), *map(spec, inputs)],
        out_specs=[spec(out) for out in outputs],
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
    )(mask.astype(jnp.float32), *inputs)
