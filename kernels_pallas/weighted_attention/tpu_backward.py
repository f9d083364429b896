"""The Mosaic kernels of the backward pass: dQ by query tiles; dK, dV, biases by key tiles.

dS = P (g v - delta) with delta = sum(output g) of a query. The keys' kernel has its scores
transposed, so that what belongs to a query is a row and nothing is turned round in the loop.
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.weighted_attention import tpu_grid
from kernels_pallas.weighted_attention.tiles import LANES, Layout, Plan
from kernels_pallas.weighted_attention.tpu_grid import column, dot, reached, rows

BEFORE, BEHIND = 0, 1  # of the key, seen from the query
NEAR = 2


def attention_query_gradient(refs: SimpleNamespace, plan: Plan) -> None:
    """dQ = dS k of one query tile."""

    @pl.when(pl.program_id(3) == 0)
    def start() -> None:
        refs.sum[...] = jnp.zeros_like(refs.sum)

    lse, delta = column(refs.lse[...]), column(refs.delta[...])

    def add(j: jax.Array, bias: jax.Array) -> None:
        key = rows(refs.key, j, plan)
        weights = jnp.exp(dot(refs.query[...], key, (1, 1)) + bias - lse)
        change = weights * (dot(refs.g[...], rows(refs.value, j, plan), (1, 1)) - delta)
        refs.sum[...] += dot(change.astype(key.dtype), key, (1, 0))

    tpu_grid.walk(refs, plan, *tpu_grid.over_keys(refs, plan, add))

    @pl.when(pl.program_id(3) == plan.chunks - 1)
    def finish() -> None:
        refs.dq[...] = refs.sum[...].astype(refs.dq.dtype)


def attention_key_gradients(refs: SimpleNamespace, plan: Plan) -> None:
    """dV = P' g, dK = dS' q, and sums of dS over queries (key bias) and buckets (table)."""

    @pl.when(pl.program_id(3) == 0)
    def start() -> None:
        for sums in (refs.dk_sum, refs.dv_sum, refs.side_sums):
            sums[...] = jnp.zeros_like(sums)

    @pl.when((pl.program_id(3) == 0) & (pl.program_id(2) == 0))
    def start_table() -> None:
        refs.dtable[...] = jnp.zeros_like(refs.dtable)

    own_bias = column(refs.bias[...])
    # Read here: no interpreter knows program_id inside a loop.
    own_tile = pl.program_id(0) * plan.tiles + pl.program_id(2)
    other_tile = pl.program_id(0) * plan.tiles + pl.program_id(3) * plan.resident

    def add(i: jax.Array, bias: jax.Array, side: jax.Array | int) -> jax.Array:
        query, g = rows(refs.query, i, plan), rows(refs.g, i, plan)
        weights = jnp.exp(dot(refs.key[...], query, (1, 1)) + bias - refs.lse[i])  # [keys, queries]
        refs.dv_sum[...] += dot(weights.astype(g.dtype), g, (1, 0))
        change = weights * (dot(refs.value[...], g, (1, 1)) - refs.delta[i])
        refs.dk_sum[...] += dot(change.astype(query.dtype), query, (1, 0))
        parts = [change[:, n : n + LANES] for n in range(0, plan.tile, LANES)]
        refs.side_sums[side] += functools.reduce(jnp.add, parts)
        return change

    head = pl.program_id(1) * 2

    def far(i: jax.Array, side: jax.Array | int) -> None:
        # Queries before the keys see them behind.
        add(i, own_bias + refs.far[head + 1 - side], 1 - side)

    def near(i: jax.Array) -> None:
        distance = column(refs.own_position[...]) - refs.position[i]
        buckets = tpu_grid.bucket(distance, refs.buckets[...], plan)
        relative = tpu_grid.look_up(refs.table[...], buckets)
        refs.changes[...] = add(i, own_bias + relative, NEAR)
        refs.chosen[...] = buckets.astype(jnp.float32)  # small integers are exact
        reach = _reach(refs.bounds, own_tile, other_tile + i, plan)
        _count(reach, refs, plan)

    tpu_grid.walk(refs, plan, far, near)

    @pl.when(pl.program_id(3) == plan.chunks - 1)
    def finish() -> None:
        refs.dk[...] = refs.dk_sum[...].astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_sum[...].astype(refs.dv.dtype)
        sums = refs.side_sums[...]
        refs.dbias[...] = tpu_grid.row(sums.sum(axis=0).sum(axis=1, keepdims=True))
        if plan.num_buckets:
            half = plan.num_buckets // 2
            for side in (BEFORE, BEHIND):
                last = half * (side + 1) - 1
                refs.dtable[last : last + 1, :LANES] += sums[side].sum(axis=0, keepdims=True)


def _reach(
    bounds_ref: Any, key: jax.Array, query: jax.Array, plan: Plan
) -> list[tuple[jax.Array, jax.Array]]:
    """Buckets (first, one behind the last) that a pair of tiles can hold, before and behind."""
    key, query = key * 2, query * 2
    behind = bounds_ref[key] - bounds_ref[query + 1], bounds_ref[key + 1] - bounds_ref[query]
    before = -behind[1], -behind[0]
    half = plan.num_buckets // 2
    reach = []
    for (least, most), floor, base in ((before, 0, 0), (behind, 1, half)):
        first = base + reached(jnp.maximum(least, floor), plan)
        last = base + reached(most, plan) + 1
        reach.append((first, jnp.where(most < floor, first, last)))
    return reach


def _count(reach: Sequence[tuple[jax.Array, jax.Array]], refs: SimpleNamespace, plan: Plan) -> None:
    """Adds the changes of each bucket to its row of the table [num_buckets, T]."""

    def one(bucket: jax.Array, _: None) -> None:
        chosen = refs.chosen[...] == bucket.astype(jnp.float32)
        changes = jnp.where(chosen, refs.changes[...], 0.0)
        refs.dtable[pl.ds(bucket, 1), :] += changes.sum(axis=0, keepdims=True)

    for first, last in reach:
        jax.lax.fori_loop(first, last, one, None)


def query_gradient(
    heads: Sequence[jax.Array], rows: Sequence[jax.Array], layout: Layout, plan: Plan
) -> jax.Array:
    """Returns dQ [B, h, R, dh].

    Args:
      heads: queries, keys, values and the cotangent of the output, each [B, h, R, dh].
      rows: log-sum-exp and sum(output * cotangent) of each query, [B, h, N, 1, T].
      layout: biases and positions.
      plan: sizes.
    """
    query, key, value, g = heads
    inputs = {
        "query": ("own", query),
        "g": ("own", g),
        "lse": ("own_head", rows[0]),
        "delta": ("own_head", rows[1]),
        "key": ("other", key),
        "value": ("other", value),
        "bias": ("other_rows", layout.bias),
        **tpu_grid.bias_inputs(layout),
    }
    outputs = {"dq": ("own", jax.ShapeDtypeStruct(query.shape, query.dtype))}
    scratch = {"sum": (plan.tile, plan.width)}
    scalars = {"near": layout.near, "far": layout.far}
    return tpu_grid.call(attention_query_gradient, plan, scalars, inputs, outputs, scratch)[0]


def key_gradients(
    heads: Sequence[jax.Array], rows: Sequence[jax.Array], layout: Layout, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns dK, dV [B, h, R, dh], d key bias [B, h, N, 1, T], d table [B, h, num_buckets, T].

    The last is to be summed over T. Arguments as of `query_gradient`.
    """
    query, key, value, g = heads
    batch = query.shape[0]
    inputs = {
        "key": ("own", key),
        "value": ("own", value),
        "bias": ("own_row", layout.bias),
        "query": ("other", query),
        "g": ("other", g),
        "lse": ("other_heads", rows[0]),
        "delta": ("other_heads", rows[1]),
        **tpu_grid.bias_inputs(layout),
    }
    sums = (batch, plan.heads, max(plan.num_buckets, 8), plan.tile)
    outputs = {
        "dk": ("own", jax.ShapeDtypeStruct(key.shape, key.dtype)),
        "dv": ("own", jax.ShapeDtypeStruct(value.shape, value.dtype)),
        "dbias": ("own_head", tpu_grid.per_token(plan, batch)),
        "dtable": ("sums", jax.ShapeDtypeStruct(sums, jnp.float32)),
    }
    scratch = {
        "dk_sum": (plan.tile, plan.width),
        "dv_sum": (plan.tile, plan.width),
        "side_sums": (3, plan.tile, LANES),
    }
    if plan.num_buckets:
        scratch |= {"changes": (plan.tile, plan.tile), "chosen": (plan.tile, plan.tile)}
    scalars = {"near": layout.near, "far": layout.far, "bounds": layout.bounds}
    dk, dv, dbias, dtable = tpu_grid.call(
        attention_key_gradients, plan, scalars, inputs, outputs, scratch
    )
    return dk, dv, dbias, dtable
