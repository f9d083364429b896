"""Weighted attention in plain JAX with a chunk of queries at a time: memory linear in r.

For the CPU, for GPUs before Hopper, and wherever T5's relative bias meets a GPU. The scores of a
chunk [B, h, c, r] are made again in the backward pass.

Symbols: B batch, r tokens, h heads, dh width of a head, c queries a chunk, n buckets.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.weighted_attention.relative import RelativeBias, bucket

CHUNK = {"cpu": 64}  # queries; on a CPU the scores of few stay in cache
CHUNK_ELSEWHERE = 256


def weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None = None,
    *,
    chunk: int = CHUNK_ELSEWHERE,
    compute_dtype: Any = None,
) -> jax.Array:
    """As `reference.weighted_attention`, for a bias [B, r] that is `reference.shifted`.

    Args:
      query: [B, r, h, dh].
      key: as `query`.
      value: as `query`.
      key_bias: [B, r] float32.
      relative: T5's relative bias.
      chunk: c.
      compute_dtype: of the matrix products; default that of the input. The CPU needs float32: it
        lacks the bfloat16 products of the backward pass.
    """
    dtype, chunk = value.dtype, min(chunk, query.shape[1])
    query, key, value = (x.astype(compute_dtype or dtype) for x in (query, key, value))
    return _attention(chunk, query, key, value, key_bias, relative).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    chunk: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None,
) -> jax.Array:
    return _attention_forward(chunk, query, key, value, key_bias, relative)[0]


def _attention_forward(chunk: int, query, key, value, key_bias, relative):
    key_heads, value_heads = key.swapaxes(1, 2), value.swapaxes(1, 2)

    def step(_: None, part: tuple[jax.Array, jax.Array | None]) -> tuple[None, Any]:
        rows, positions = part
        scores = _scores(rows, key_heads, key_bias, relative, _buckets(positions, relative))
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = _product("bhqk,bhkd->bhqd", weights.astype(value.dtype), value_heads)
        # Dividing the mixed values instead of the weights saves a pass over [c, r].
        mixed = (mixed / total).astype(value.dtype).swapaxes(1, 2)
        return None, (mixed, (top + jnp.log(total))[..., 0])

    positions = None if relative is None else _cut(relative.positions, chunk)
    _, (out, lse) = jax.lax.scan(step, None, (_cut(query, chunk), positions))
    out = _join(out, query.shape[1])
    return out, (query, key, value, key_bias, relative, out, lse)


def _attention_backward(chunk: int, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    query, key, value, key_bias, relative, out, lse = saved
    delta = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(axis=-1)
    g = g.astype(value.dtype)
    key_heads, value_heads = key.swapaxes(1, 2), value.swapaxes(1, 2)

    def step(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        rows, grads, delta, lse, positions = part
        dk, dv, dbias, dtable = sums
        buckets = _buckets(positions, relative)
        scores = _scores(rows, key_heads, key_bias, relative, buckets)
        weights = jnp.exp(scores - lse[..., None])
        change = _product("bqhd,bhkd->bhqk", grads, value_heads) - delta.swapaxes(1, 2)[..., None]
        change = weights * change
        half = change.astype(query.dtype)
        dv = dv + _product("bhqk,bqhd->bhkd", weights.astype(g.dtype), grads)
        dk = dk + _product("bhqk,bqhd->bhkd", half, rows)
        dbias = dbias + change.sum(axis=(1, 2))
        if buckets is not None:
            dtable = dtable + _count(change, buckets, relative.num_buckets)
        dq = _product("bhqk,bhkd->bqhd", half, key_heads).astype(query.dtype)
        return (dk, dv, dbias, dtable), dq

    positions = None if relative is None else _cut(relative.positions, chunk)
    start = (
        jnp.zeros(key_heads.shape, jnp.float32),
        jnp.zeros(value_heads.shape, jnp.float32),
        jnp.zeros(key_bias.shape, jnp.float32),
        None if relative is None else jnp.zeros(relative.table.shape, jnp.float32),
    )
    parts = (_cut(query, chunk), _cut(g, chunk), _cut(delta, chunk), lse, positions)
    (dk, dv, dbias, dtable), dq = jax.lax.scan(step, start, parts)
    dq = _join(dq, query.shape[1])
    dk, dv = dk.swapaxes(1, 2).astype(key.dtype), dv.swapaxes(1, 2).astype(value.dtype)
    drelative = None
    if relative is not None:
        nothing = np.zeros(relative.positions.shape, jax.dtypes.float0)
        table = dtable.astype(relative.table.dtype)
        drelative = RelativeBias(nothing, table, relative.max_distance, relative.ordered)
    return dq, dk, dv, dbias, drelative


_attention.defvjp(_attention_forward, _attention_backward)


def _product(formula: str, *factors: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *factors, preferred_element_type=jnp.float32)


def _scores(
    query: jax.Array,
    key_heads: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None,
    buckets: jax.Array | None,
) -> jax.Array:
    """Scores [B, h, c, r] of queries [B, c, h, dh]."""
    scores = _product("bqhd,bhkd->bhqk", query, key_heads) + key_bias[:, None, None, :]
    if buckets is None:
        return scores
    table = relative.table.astype(jnp.float32).T  # [h, n]
    return scores + jax.vmap(lambda row: table[:, row])(buckets)


def _buckets(positions: jax.Array | None, relative: RelativeBias | None) -> jax.Array | None:
    """The buckets [B, c, r] of queries at positions [B, c]."""
    if relative is None:
        return None
    distance = relative.positions[:, None, :] - positions[:, :, None]
    return bucket(distance, relative.num_buckets, relative.max_distance)


def _count(change: jax.Array, buckets: jax.Array, num_buckets: int) -> jax.Array:
    """Sums [n, h] of [B, h, c, r] over the pairs of each bucket [B, c, r]."""
    chosen = jax.nn.one_hot(buckets, num_buckets, dtype=change.dtype)
    return _product("bhqk,bqkn->nh", change, chosen)


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """[B, r, ...] -> [chunks, B, c, ...], filled up with zeros."""
    spare = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """[chunks, B, c, ...] -> [B, r, ...]."""
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
