"""Visiting the listed blocks of a bank from a TPU kernel, by asynchronous copies made by hand.

Blocks come and go a tile of T blocks at a time, two tiles in flight: one block (48 KB at b = 16,
float32) is too little for a grid step. Blocks of an example differ, so no copy meets another; the
spare places of the last tile repeat its last block, and write the same values again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE_BYTES = 512 * 1024  # of the tokens of a tile in float32: about the latency of a copy
MOST_BLOCKS = 16  # a tile

Math = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array of a kernel: tokens of blocks [B, n, b, d], float32 rows [B, n, d] or masks.

    Attributes:
      shape: of the array.
      dtype: of the array.
      at: where block s of the list is: at "index"[s] or at its "slot" s; "tile": entry j holds all
        of tile j [T, b]; "": nothing is read, it only lends its memory to an output.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    at: str

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of the part that belongs to one block (for "tile", to one tile)."""
        return self.shape[2:] if len(self.shape) == 4 else (1, self.shape[2])


def like(array: jax.Array) -> Operand:
    """Returns the output that replaces listed blocks of `array`."""
    return Operand(array.shape, array.dtype, "index")


def to_column(row: jax.Array) -> jax.Array:
    """Turns [1, b] into [b, 1] by a sum over the diagonal: lanes do not become rows otherwise."""
    size = row.shape[1]
    rows = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return jnp.where(rows == columns, row, 0.0).sum(axis=1, keepdims=True)


# Left alone, XLA carries a bank that fits into on-chip memory there and back for every kernel that
# updates it, all of it, so that the kernel has it near: banks are pinned to HBM.
def is_bank(operand: Operand) -> bool:
    """Returns whether it is a bank of differences: listed blocks of it come, go or both."""
    return len(operand.shape) == 4 and operand.at in ("index", "")


def _placed(array: jax.Array, at: str, interpret: bool) -> jax.Array:
    if interpret or not is_bank(Operand(array.shape, array.dtype, at)):
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _placed_out(out: Operand, interpret: bool) -> jax.ShapeDtypeStruct | pl.MemoryRef:
    if interpret or not is_bank(out):
        return jax.ShapeDtypeStruct(out.shape, out.dtype)
    return pltpu.HBM(out.shape, out.dtype)


def visit(
    math: Math,
    index: jax.Array,
    mask: jax.Array | None,
    inputs: Sequence[tuple[jax.Array, str]],
    outputs: Sequence[tuple[Operand, int | None]],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `math` on every listed block of every example.

    Args:
      math: ([x, d] blocks of the inputs that are read, mask [b, 1] if any) -> blocks of outputs.
      index: [B, k].
      mask: None or [B, k, b].
      inputs: arrays [B, n, b, d] or [B, n, d], and where block s of the list is (`Operand.at`).
      outputs: and the input that each overwrites.
      interpret: run on any platform.
    """
    arrays = [_placed(array, at, interpret) for array, at in inputs]
    operands = [Operand(array.shape, array.dtype, at) for array, at in inputs]
    results = [out for out, _ in outputs]
    batch, k = index.shape
    size, d = next(o.block for o in (*operands, *results) if len(o.shape) == 4)
    tile = min(k, MOST_BLOCKS, max(1, TILE_BYTES // (size * d * 4)))
    if mask is not None:
        spare = ((0, 0), (0, -k % tile), (0, 0))  # they repeat the last block, with its mask
        mask = jnp.pad(mask.astype(jnp.float32), spare, mode="edge")
        arrays.append(mask.reshape(batch, -1, tile, size))
        operands.append(Operand(arrays[-1].shape, jnp.dtype(jnp.float32), "tile"))
    read = [operand for operand in operands if operand.at]
    buffers = [
        pltpu.VMEM((2, *(() if operand.at == "tile" else (tile,)), *operand.block), operand.dtype)
        for operand in (*read, *results)
    ]
    moved = batch * k * size * d * sum(o.dtype.itemsize for o in (*read, *results))
    by_hand = pl.BlockSpec(memory_space=pl.ANY)  # the kernel copies what it needs
    made = pl.pallas_call(
        functools.partial(_kernel, math, operands, results, tile, k),
        out_shape=[_placed_out(out, interpret) for out in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[by_hand] * len(arrays),
            out_specs=[by_hand] * len(results),
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))],
        ),
        input_output_aliases={1 + i: o for o, (_, i) in enumerate(outputs) if i is not None},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
    )(index, *arrays)
    # A pinned array cannot be the result of a whole program (libtpu 0.0.42 refuses it); this can.
    return [
        jax.lax.optimization_barrier(array) if is_bank(out) and not interpret else array
        for out, array in zip(results, made, strict=True)
    ]


def _kernel(
    math: Math,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    tile: int,
    k: int,
    index_ref: jax.Ref,
    *refs: jax.Ref,
) -> None:
    """One example: while tile j is worked on, tile j + 1 comes in and tile j - 1 goes out."""
    example, tiles = pl.program_id(0), pl.cdiv(k, tile)
    *refs, arrived, left = refs
    arrays, refs = refs[: len(operands)], refs[len(operands) :]
    targets, buffers = refs[: len(results)], refs[len(results) :]
    read = [pair for pair in zip(operands, arrays, strict=True) if pair[0].at]
    comes = [(*pair, buffer) for pair, buffer in zip(read, buffers, strict=False)]
    goes = list(zip(results, targets, buffers[len(read) :], strict=True))

    def each_copy(streams: Sequence[tuple], j: jax.Array, out: bool, act: Callable) -> None:
        half = jax.lax.rem(j, 2)

        def move(source: jax.Ref, target: jax.Ref) -> None:
            ends = (target, source) if out else (source, target)
            act(pltpu.make_async_copy(*ends, (left if out else arrived).at[half]))

        for operand, ref, buffer in streams:
            if operand.at == "tile":
                move(ref.at[example, j], buffer.at[half])

        @pl.loop(0, tile)
        def _(t: jax.Array) -> None:
            slot = jnp.minimum(j * tile + t, k - 1)
            for operand, ref, buffer in streams:
                if operand.at != "tile":
                    row = index_ref[example, slot] if operand.at == "index" else slot
                    row = row if len(operand.shape) == 4 else pl.ds(row, 1)
                    move(ref.at[example, row], buffer.at[half, t])

    start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())
    each_copy(comes, jnp.int32(0), False, start)

    @pl.loop(0, tiles)
    def _(j: jax.Array) -> None:
        half = jax.lax.rem(j, 2)

        @pl.when(j + 1 < tiles)
        def _() -> None:
            each_copy(comes, j + 1, False, start)

        @pl.when(j >= 2)
        def _() -> None:  # the half that is written next has gone out
            each_copy(goes, j - 2, True, wait)

        each_copy(comes, j, False, wait)

        @pl.loop(0, tile)
        def _(t: jax.Array) -> None:
            blocks = [
                to_column(buffer[half, pl.ds(t, 1)]) if operand.at == "tile" else buffer[half, t]
                for operand, _, buffer in comes
            ]
            for (result, _, buffer), block in zip(goes, math(*blocks), strict=True):
                buffer[half, t] = block.astype(result.dtype)

        each_copy(goes, j, True, start)

    for j in range(max(0, tiles - 2), tiles):
        each_copy(goes, jnp.int32(j), True, wait)
