"""Keys and values kept while a sequence grows token by token, and attention to them.

Array axes: B rows, H query heads, G heads of keys and values, T places, D head width. Places come
after heads, so that reading all places of a head, which every step does, is one contiguous block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """Keys and values of the tokens decoded so far, in static shapes.

    Attributes:
      key: [B, G, max_length, D].
      value: [B, G, max_length, D].
      length: scalar int32, tokens held.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: Any = jnp.float32) -> "KVCache":
        """Returns a cache of `shape` [B, G, max_length, D] that holds nothing."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    @classmethod
    def full(cls, key: jax.Array, value: jax.Array) -> "KVCache":
        """Returns a cache that holds just `key` and `value` [B, T, G, D] (of an encoder output)."""
        length = jnp.asarray(key.shape[1], jnp.int32)
        return cls(key.swapaxes(1, 2), value.swapaxes(1, 2), length)

    @property
    def max_length(self) -> int:
        """Places in the cache."""
        return self.key.shape[2]

    def append(self, key: jax.Array, value: jax.Array) -> "KVCache":
        """Returns the cache with `key` and `value` [B, T, G, D] written after what it holds."""
        start = (0, 0, self.length, 0)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        return KVCache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), start),
            self.length + key.shape[2],
        )


def cached_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Attention of a few queries to cached keys, softmax in float32.

    Args:
      query: [N, Q, H, D], scaled; N a multiple of B, H of G.
      key: [B, G, T, D].
      value: [B, G, T, D].
      bias: None, or broadcastable to [N, H, Q, T]; [B or 1, 1, 1, T] where N > B.

    Returns:
      [N, Q, H, D] in the dtype of `query`.
    """
    rows, length, heads, width = query.shape
    batch, kv_heads = key.shape[:2]
    # Rows that share keys become queries of one row: the keys are read once for all of them.
    grouped = query.reshape(batch, rows // batch * length, kv_heads, -1, width)
    scores = jnp.einsum("bqgsd,bgtd->bgsqt", grouped, key, preferred_element_type=jnp.float32)
    if bias is not None:
        if bias.shape[1] == 1:
            bias = bias[:, :, None]
        else:
            bias = bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    # One axis for all queries of a head: the CPU has no half-precision product for two.
    flat = weights.reshape(batch, kv_heads, -1, weights.shape[-1])
    mixed = jnp.einsum("bgmt,bgtd->bgmd", flat, value, preferred_element_type=jnp.float32)
    mixed = jnp.moveaxis(mixed.reshape(*weights.shape[:-1], width), 3, 1)
    return mixed.reshape(rows, length, heads, width).astype(query.dtype)
