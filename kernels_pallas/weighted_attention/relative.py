"""T5's relative bias as the kernels take it: positions, a table, and integer bucket thresholds.

The thresholds are made on the host in float64: a device's logarithm may fall short of an integer.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "table"],
    meta_fields=["max_distance", "ordered"],
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A bias a head and bucket of the distance key - query, in both directions (an encoder's).

    Attributes:
      positions: [B, r] int32, those of the tokens; in any order, repeats allowed.
      table: [num_buckets, h] float32; the second half of the rows is for keys after the query.
      max_distance: from which on the last bucket of a direction holds everything.
      ordered: the positions ascend already, so that no kernel sorts them. If they do not, the
        result is still right, and slower.
    """

    positions: jax.Array
    table: jax.Array
    max_distance: int = 128
    ordered: bool = False

    @property
    def num_buckets(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]


@functools.cache
def thresholds(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the distances at which the bucket of |key - query| goes up by one, int32.

    The bucket of a distance is the number of thresholds that it reaches; from the last one on
    nothing changes. 32 buckets, distance 128: 1, 2, ... 8, 12, 16, 23, 32, 46, 64, 91.

    Raises:
      ValueError: too few buckets, or a maximum distance that leaves no room for the logarithm.
    """
    one_way = num_buckets // 2
    exact = one_way // 2
    if num_buckets % 2 or exact < 1 or max_distance <= exact:
        raise ValueError(
            f"num_buckets={num_buckets}, max_distance={max_distance}: wanted an even number of at "
            f"least 4 buckets and a distance above a quarter of it."
        )
    distance = np.arange(max_distance + 1)
    logarithm = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + np.floor(logarithm * (one_way - exact) + 1e-9)
    bucket = np.where(distance < exact, distance, np.minimum(far, one_way - 1))
    # A jump over several buckets repeats its distance, so that the count stays the bucket.
    steps = np.maximum(np.diff(bucket), 0).astype(int)
    return np.repeat(distance[1:], steps).astype(np.int32)


def far_distance(num_buckets: int, max_distance: int) -> int:
    """Returns the distance from which on a direction has one bucket."""
    return int(thresholds(num_buckets, max_distance)[-1])


def bucket(relative: jax.Array, num_buckets: int, max_distance: int) -> jax.Array:
    """Returns the row of the table for each distance key - query (int32, any shape)."""
    far = far_distance(num_buckets, max_distance)
    steps = thresholds(num_buckets, max_distance)
    one_way = np.searchsorted(steps, np.arange(far + 1), side="right").astype(np.int32)
    rows = np.concatenate(
        [one_way[:0:-1], one_way + np.where(np.arange(far + 1), num_buckets // 2, 0)]
    )
    return jnp.asarray(rows.astype(np.int32))[jnp.clip(relative, -far, far) + far]
