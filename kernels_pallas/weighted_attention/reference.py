"""Attention with a bias a key and T5's relative bias in plain JAX: what every kernel must equal.

Symbols: B batch, r tokens, h heads, dh width of a head.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.weighted_attention.relative import RelativeBias, bucket

LOWEST = -1e30  # of a bias after `shifted`; finite, so that minus infinity makes no NaN


def shifted(key_bias: jax.Array) -> jax.Array:
    """Returns the bias [B, r] less its greatest entry, and at least `LOWEST`.

    Softmax does not see the difference; but scores keep their digits where every key has a bias of
    -1000 or -1e9. Attention gives no gradient in the direction of a common shift.
    """
    key_bias = jnp.maximum(key_bias.astype(jnp.float32), LOWEST)
    return key_bias - jax.lax.stop_gradient(key_bias.max(axis=-1, keepdims=True))


def relative_scores(relative: RelativeBias) -> jax.Array:
    """Returns the relative bias of every pair, [B, h, r, r] float32."""
    positions = relative.positions
    distance = positions[:, None, :] - positions[:, :, None]
    rows = bucket(distance, relative.num_buckets, relative.max_distance)
    return jnp.moveaxis(relative.table.astype(jnp.float32)[rows], -1, 1)


def weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None = None,
) -> jax.Array:
    """softmax(q k + key bias + relative bias) v, with all [B, h, r, r] scores at once.

    Args:
      query: [B, r, h, dh] float32 or bfloat16, already scaled.
      key: as `query`.
      value: as `query`.
      key_bias: [B, r] float32, added to the scores of a key.
      relative: T5's relative bias.

    Returns:
      [B, r, h, dh] in the dtype of `value`.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores + shifted(key_bias)[:, None, None, :]
    if relative is not None:
        scores = scores + relative_scores(relative)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value, preferred_element_type=jnp.float32)
    return mixed.astype(value.dtype)
