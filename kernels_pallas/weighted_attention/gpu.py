"""Weighted attention on GPU: cuDNN's fused attention where the key bias fits into extra features.

The bias of a key is the product of two features more: its leading bfloat16 digits and the rest,
each times 1 in the query. So cuDNN needs no bias [B, r, r], and the gradient of the bias is the
gradient of the first of the two. T5's relative bias has no such form: in chunks then.

Symbols: B batch, r tokens, h heads, dh width of a head.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.weighted_attention import xla
from kernels_pallas.weighted_attention.relative import RelativeBias

EXTRA = 8  # features; cuDNN wants a multiple of 8
WIDEST = 128  # head that cuDNN takes on every GPU since Ampere
HALF = (jnp.bfloat16, jnp.float16)


def weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None = None,
) -> jax.Array:
    """As `reference.weighted_attention`, for a bias [B, r] that is `reference.shifted`.

    Args:
      query: [B, r, h, dh].
      key: as `query`.
      value: as `query`.
      key_bias: [B, r] float32.
      relative: T5's relative bias; with it, in float32 and for heads wider than 120 the scores
        are made in chunks by XLA.
    """
    if relative is not None or not fused(query):
        return xla.weighted_attention(query, key, value, key_bias, relative)
    query, key, value = with_extra_features(query, key, value, key_bias)
    out = jax.nn.dot_product_attention(query, key, value, scale=1.0, implementation="cudnn")
    return out[..., :-EXTRA]


def fused(query: jax.Array) -> bool:
    """Whether cuDNN takes these heads [B, r, h, dh] with the extra features."""
    return query.dtype in HALF and query.shape[-1] % 8 == 0 and query.shape[-1] + EXTRA <= WIDEST


def with_extra_features(
    query: jax.Array, key: jax.Array, value: jax.Array, key_bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values [B, r, h, dh + 8] whose plain attention has the key bias."""
    leading = key_bias.astype(key.dtype)
    rest = (key_bias - leading.astype(jnp.float32)).astype(key.dtype)
    digits = jnp.stack([leading, rest], axis=-1)[:, :, None, :]  # [B, r, 1, 2]
    digits = jnp.broadcast_to(digits, (*key.shape[:3], 2))
    widen = ((0, 0), (0, 0), (0, 0))
    ones = jnp.pad(jnp.ones_like(digits), (*widen, (0, EXTRA - 2)))
    digits = jnp.pad(digits, (*widen, (0, EXTRA - 2)))
    return (
        jnp.concatenate([query, ones.astype(query.dtype)], axis=-1),
        jnp.concatenate([key, digits], axis=-1),
        jnp.pad(value, (*widen, (0, EXTRA))),
    )
