"""What the TPU kernels share: lookups within a tile, the walk over tiles, and the grid itself.

A step of the grid (example, head, own tile, chunk of the other side) has one tile of its own side
on chip and loops over the other side's tiles: far before, near, far behind. In the forward pass
and for dQ the own side is the queries'; for dK, dV and the biases it is the keys'.

Symbols: see `tiles`; tiles of scores are [T, T].
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.weighted_attention.relative import far_distance, thresholds
from kernels_pallas.weighted_attention.tiles import LANES, Layout, Plan

VMEM_LIMIT = 48 << 20  # bytes; the default of 16 MiB is less than float32 wants


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product in float32 over an axis of each; float32 operands keep all their digits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def column(row: jax.Array) -> jax.Array:
    """[1, T] -> [T, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def row(column: jax.Array) -> jax.Array:
    """[T, 1] -> [1, T]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[0, index] for a table [1, 128] and an index [T, T]: a gather within lanes."""
    table = jnp.broadcast_to(table, (index.shape[0], LANES))
    parts = [
        jnp.take_along_axis(table, index[:, start : start + LANES], 1, mode="promise_in_bounds")
        for start in range(0, index.shape[1], LANES)
    ]
    return jnp.concatenate(parts, axis=1)


def bucket(distance: jax.Array, buckets: jax.Array, plan: Plan) -> jax.Array:
    """The bucket of each distance key - query [T, T] int32."""
    far = far_distance(plan.num_buckets, plan.max_distance)
    size = jnp.minimum(jnp.abs(distance), far)
    if far < LANES:
        bucket = look_up(buckets, size)
    else:
        bucket = reached(size, plan)
    return bucket + jnp.where(distance > 0, plan.num_buckets // 2, 0)


def reached(distance: jax.Array, plan: Plan) -> jax.Array:
    """How many thresholds a distance (any shape) reaches."""
    count = jnp.zeros_like(distance)
    for step in thresholds(plan.num_buckets, plan.max_distance):
        count = count + jnp.where(distance >= int(step), 1, 0)
    return count


def rows(ref: Any, tile: jax.Array, plan: Plan) -> jax.Array:
    """Rows of a tile of a resident [resident T, dh]."""
    return ref[pl.ds(pl.multiple_of(tile * plan.tile, plan.tile), plan.tile), :]


def over_keys(
    refs: SimpleNamespace, plan: Plan, add: Callable[[jax.Array, jax.Array], None]
) -> tuple[Callable[[jax.Array, jax.Array | int], None], Callable[[jax.Array], None]]:
    """The two callbacks of `walk` where the own side is the queries': add(tile, its bias)."""
    head = pl.program_id(1) * 2

    def far(j: jax.Array, side: jax.Array | int) -> None:
        add(j, refs.bias[j] + refs.far[head + side])

    def near(j: jax.Array) -> None:
        distance = refs.position[j] - column(refs.own_position[...])
        add(j, refs.bias[j] + look_up(refs.table[...], bucket(distance, refs.buckets[...], plan)))

    return far, near


def walk(
    refs: SimpleNamespace,
    plan: Plan,
    far: Callable[[jax.Array, jax.Array | int], None],
    near: Callable[[jax.Array], None],
) -> None:
    """Calls far(tile, side) and near(tile) for the resident tiles of the other side.

    The side says whether the other tile is before (0) or behind (1) the own one. Both far runs
    share one loop: compiling is most of what these kernels cost until they run.
    """
    if not plan.num_buckets:
        jax.lax.fori_loop(0, plan.resident, lambda j, _: far(j, 0), None)
        return
    own = (pl.program_id(0) * plan.tiles + pl.program_id(2)) * 2
    start = pl.program_id(3) * plan.resident
    first = jnp.clip(refs.near[own] - start, 0, plan.resident)
    last = jnp.clip(refs.near[own + 1] - start, first, plan.resident)

    def skip(n: jax.Array, _: None) -> None:
        behind = (n >= first).astype(jnp.int32)
        far(n + behind * (last - first), behind)

    jax.lax.fori_loop(0, plan.resident - (last - first), skip, None)
    jax.lax.fori_loop(first, last, lambda j, _: near(j), None)


def _specs(plan: Plan) -> dict[str, pl.BlockSpec]:
    """Blocks by what they are; an index map gets the prefetched scalars as well."""
    tile, width, resident = plan.tile, plan.width, plan.resident
    rows = resident * tile

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, h, i, c, *_: index(b, h, i, c))

    return {
        "own": spec((None, None, tile, width), lambda b, h, i, c: (b, h, i, 0)),
        "other": spec((None, None, rows, width), lambda b, h, i, c: (b, h, c, 0)),
        "own_row": spec((None, None, 1, tile), lambda b, h, i, c: (b, i, 0, 0)),
        "other_rows": spec((None, resident, 1, tile), lambda b, h, i, c: (b, c, 0, 0)),
        "own_head": spec((None, None, None, 1, tile), lambda b, h, i, c: (b, h, i, 0, 0)),
        "other_heads": spec((None, None, resident, 1, tile), lambda b, h, i, c: (b, h, c, 0, 0)),
        "table": spec((None, 1, LANES), lambda b, h, i, c: (h, 0, 0)),
        "buckets": spec((1, LANES), lambda b, h, i, c: (0, 0)),
        "sums": spec((None, None, max(plan.num_buckets, 8), tile), lambda b, h, i, c: (b, h, 0, 0)),
    }


def call(
    kernel: Callable[[SimpleNamespace, Plan], None],
    plan: Plan,
    scalars: Mapping[str, jax.Array],
    inputs: Mapping[str, tuple[str, jax.Array]],
    outputs: Mapping[str, tuple[str, jax.ShapeDtypeStruct]],
    scratch: Mapping[str, tuple[int, ...]],
) -> list[jax.Array]:
    """Runs a kernel over the grid; it finds its references by the names given here.

    Args:
      kernel: called as kernel(references, plan).
      plan: sizes.
      scalars: int32 and float32 vectors that are there before the first step.
      inputs: block (of `_specs`) and array.
      outputs: block and shape.
      scratch: shapes of float32 working space.
    """
    specs = _specs(plan)
    names = [*scalars, *inputs, *outputs, *scratch]
    batch = next(iter(inputs.values()))[1].shape[0]

    def run(*references: Any) -> None:
        kernel(SimpleNamespace(**dict(zip(names, references, strict=True))), plan)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(batch, plan.heads, plan.tiles, plan.chunks),
        in_specs=[specs[block] for block, _ in inputs.values()],
        out_specs=[specs[block] for block, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
    )
    return pl.pallas_call(
        run,
        grid_spec=grid,
        out_shape=[shape for _, shape in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=plan.interpret,
        name=kernel.__name__,
    )(*scalars.values(), *(x for _, x in inputs.values()))


def per_token(plan: Plan, batch: int) -> jax.ShapeDtypeStruct:
    """Shape of a number a head and token, in tiles."""
    return jax.ShapeDtypeStruct((batch, plan.heads, plan.tiles, 1, plan.tile), jnp.float32)


def bias_inputs(layout: Layout) -> dict[str, tuple[str, jax.Array]]:
    """The inputs that say which bias a pair of tokens has, the key's own aside."""
    return {
        "own_position": ("own_row", layout.positions),
        "position": ("other_rows", layout.positions),
        "table": ("table", layout.table),
        "buckets": ("buckets", layout.buckets),
    }
