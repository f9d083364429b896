"""How the TPU kernels cut r tokens: the layout of their inputs, and which tile pairs are far apart.

A pair of a query tile and a key tile is *far* where every |key - query| has reached the last
bucket: the relative bias is then one number a head and direction. With tokens in order of position
the near pairs lie along the diagonal. For each tile of one side the tiles of the other side are
three runs: far before, near, far behind.

Symbols: B batch, r tokens, h heads, dh width of a head, N tiles, T tokens a tile, R = N T >= r.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.weighted_attention.relative import RelativeBias, far_distance, thresholds

TILE = 512  # tokens at most
RESIDENT_BYTES = 2 << 20  # of one head's keys (or values) that a kernel keeps on chip at once
PADDING = -2e38  # bias of keys that only fill a tile: nothing beside every other key
LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static sizes of a call.

    Attributes:
      tile: T.
      tiles: N.
      resident: tiles of the other side that one step of the grid has on chip; divides N.
      heads: h.
      width: dh.
      num_buckets: rows of the table; 0 without relative bias.
      max_distance: as in `RelativeBias`.
      interpret: run the kernels in Python instead of compiling them.
    """

    tile: int
    tiles: int
    resident: int
    heads: int
    width: int
    num_buckets: int
    max_distance: int
    interpret: bool

    @property
    def chunks(self) -> int:
        """Steps of the grid over the other side."""
        return self.tiles // self.resident


def make_plan(query: jax.Array, relative: RelativeBias | None, tile: int, interpret: bool) -> Plan:
    """Returns the sizes for a query [B, r, h, dh]: as few tiles as `tile` tokens a tile allow."""
    _, length, heads, width = query.shape
    tiles = -(-length // tile)
    tile = -(-length // (tiles * LANES)) * LANES
    row = -(-width // LANES) * LANES * query.dtype.itemsize
    resident = -(-tiles // math.ceil(tiles * tile * row / RESIDENT_BYTES))
    tiles = -(-tiles // resident) * resident
    buckets = (0, 0) if relative is None else (relative.num_buckets, relative.max_distance)
    return Plan(tile, tiles, resident, heads, width, *buckets, interpret)


class Layout(NamedTuple):
    """What the kernels read besides queries, keys and values; zeros without relative bias.

    Attributes:
      bias: [B, N, 1, T] float32, `PADDING` behind the last token.
      positions: [B, N, 1, T] int32.
      bounds: [B * N * 2] int32, the least and the greatest position of a tile.
      near: [B * N * 2] int32: for a tile, the first near tile of the other side and the first
        behind the near ones.
      far: [h * 2] float32: the bias of keys far before and far behind the query.
      table: [h, 1, 128] float32, the head's biases by bucket.
      buckets: [1, 128] int32, the bucket of a distance 0 ... 127 in one direction.
    """

    bias: chex.Array
    positions: chex.Array
    bounds: chex.Array
    near: chex.Array
    far: chex.Array
    table: chex.Array
    buckets: chex.Array


def cut(rows: jax.Array, plan: Plan, **padding: Any) -> jax.Array:
    """Cuts [..., r] into tiles [..., N, 1, T]."""
    spare = [(0, 0)] * (rows.ndim - 1) + [(0, plan.tile * plan.tiles - rows.shape[-1])]
    return jnp.pad(rows, spare, **padding).reshape(*rows.shape[:-1], plan.tiles, 1, plan.tile)


def heads_first(x: jax.Array, plan: Plan) -> jax.Array:
    """Lays out and fills up [B, r, h, dh] as [B, h, R, dh]."""
    spare = plan.tile * plan.tiles - x.shape[1]
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, spare), (0, 0)))


def near_runs(positions: jax.Array, far: int) -> jax.Array:
    """Returns [B, N, 2] int32: the first near tile of each tile, and the first behind the near.

    Every tile before the first is wholly `far` or more before this one, and every tile from the
    second on wholly behind, whatever the order of the tokens.
    """
    least, most = positions.min(axis=(2, 3)), positions.max(axis=(2, 3))  # [B, N]
    before = jax.lax.cummax(most, axis=1)[:, None, :] <= least[:, :, None] - far
    behind = jax.lax.cummin(least, axis=1, reverse=True)[:, None, :] >= most[:, :, None] + far
    count = positions.shape[1]
    return jnp.stack([before.sum(axis=2), count - behind.sum(axis=2)], axis=-1).astype(jnp.int32)


def make_layout(key_bias: jax.Array, relative: RelativeBias | None, plan: Plan) -> Layout:
    """Returns the layout for a bias [B, r] and positions in the same order."""
    batch = key_bias.shape[0]
    bias = cut(key_bias, plan, constant_values=PADDING)
    if relative is None:
        nothing = jnp.zeros((batch * plan.tiles * 2,), jnp.int32)
        far = jnp.zeros((plan.heads * 2,), jnp.float32)
        table = jnp.zeros((plan.heads, 1, LANES), jnp.float32)
        buckets = jnp.zeros((1, LANES), jnp.int32)
        return Layout(bias, jnp.zeros_like(bias, jnp.int32), nothing, nothing, far, table, buckets)
    positions = cut(relative.positions, plan, mode="edge")
    bounds = jnp.stack([positions.min(axis=(2, 3)), positions.max(axis=(2, 3))], axis=-1)
    near = near_runs(positions, far_distance(plan.num_buckets, plan.max_distance))
    table = relative.table.astype(jnp.float32).T  # [h, num_buckets]
    half = plan.num_buckets // 2
    far = table[:, np.array([half - 1, 2 * half - 1])].reshape(-1)
    table = jnp.pad(table, ((0, 0), (0, LANES - plan.num_buckets)))[:, None, :]
    steps = thresholds(plan.num_buckets, plan.max_distance)
    buckets = np.searchsorted(steps, np.arange(LANES), side="right").astype(np.int32)[None]
    return Layout(
        bias, positions, bounds.reshape(-1), near.reshape(-1), far, table, jnp.asarray(buckets)
    )
