"""T5's relative position bias: buckets of distances from an integer table, one bias a head.

The table is made once on the host in float64, so that no device's logarithm decides a bucket.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.core import layers


@functools.cache
def bucket_table(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Returns the bucket of distance key - query = -max_distance ... max_distance, int32.

    Farther keys share the bucket of the ends.

    Args:
      num_buckets: in all; the two directions have half each where `bidirectional`.
      max_distance: from which on the last bucket holds everything.
      bidirectional: an encoder's; else a decoder's, where later keys are in bucket 0.

    Raises:
      ValueError: too few buckets, or a maximum distance that leaves no room for the logarithm.
    """
    one_way = num_buckets // 2 if bidirectional else num_buckets
    exact = one_way // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"num_buckets={num_buckets}, max_distance={max_distance}: wanted at least "
            f"{4 if bidirectional else 2} buckets and a distance above {exact}."
        )
    relative = np.arange(-max_distance, max_distance + 1)
    base = np.where(relative > 0, one_way, 0) if bidirectional else 0
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    logarithm = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + np.floor(logarithm * (one_way - exact) + 1e-9).astype(np.int64)
    near_or_far = np.where(distance < exact, distance, np.minimum(far, one_way - 1))
    return (base + near_or_far).astype(np.int32)


class RelativeBias(nn.Module):
    """A bias a head and bucket of the distance between key and query.

    Attributes:
      num_heads: H.
      num_buckets: rows of the table [num_buckets, H].
      max_distance: from which on the last bucket holds everything.
      bidirectional: an encoder's (True) or a decoder's.
      embedding_init: initialiser of the table.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    embedding_init: layers.Initializer = layers.normal(0.02)

    def setup(self) -> None:
        axes = (None, "heads")
        self.table = layers.partitioned(self.embedding_init, axes)
        shape = (self.num_buckets, self.num_heads)
        self.embedding = self.param("embedding", self.table, shape, jnp.float32)

    def buckets(self, relative: jax.Array) -> jax.Array:
        """Returns the bucket of each distance key - query (int, any shape)."""
        far = self.max_distance
        table = bucket_table(self.num_buckets, far, self.bidirectional)
        return jnp.asarray(table)[jnp.clip(relative, -far, far) + far]

    def at(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Returns the bias [B, H, Q, K] float32 of positions [B, Q] and [B, K] int."""
        relative = key_positions[:, None, :] - query_positions[:, :, None]
        return jnp.moveaxis(self.embedding[self.buckets(relative)], -1, 1)

    def __call__(self, num_queries: int, num_keys: int) -> Any:
        """Returns the bias [1, H, Q, K] float32 of positions 0, 1, 2, ... of both.

        Every distance is looked up once and spread over its diagonal by reshaping, whose gradient
        is a sum: no scatter of Q x K entries.
        """
        period = num_queries + num_keys
        distance = np.arange(period)
        distance = np.where(distance < num_keys, distance, distance - period)
        values = self.embedding[self.buckets(jnp.asarray(distance))].T  # [H, Q + K]
        tiled = jnp.broadcast_to(values[:, None], (self.num_heads, num_queries, period))
        flat = tiled.reshape(self.num_heads, -1)[:, : num_queries * (period - 1)]
        return flat.reshape(self.num_heads, num_queries, period - 1)[None, :, :, :num_keys]
