"""BigBird (arXiv:2007.14062), block-sparse: window, global end blocks and random blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.vcc.baseline_attentions import chunks
from jaxmodels.vcc.baseline_attentions.chunks import Drop, Keys
from jaxmodels.vcc.baseline_attentions.sparse import Heads, Sequences, SparsePattern


@struct.dataclass
class BigBirdState:
    """What all layers share.

    Attributes:
      keep: [B, n] bool.
      random: [layers, H, S - 2, R] int, blocks that each row of blocks 1 ... S - 2 reads; None
        where the text is short and everything is read.
      values: bias of each distance, or None.
    """

    keep: jax.Array
    random: jax.Array | None = None
    values: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class BigBird(SparsePattern):
    """A block of queries sees the blocks beside it, the first and last block, and random ones.

    The first and last block (of the padded length) see everything. Texts of at most
    (5 + 2 num_random_blocks) blocks are attended to as a whole, as in the published code.

    Attributes:
      block_size: tokens a block.
      num_random_blocks: R, for each head, layer and block of queries.
      seed: of the random blocks.

    Raises:
      ValueError: an empty block, or a negative number of random ones.
    """

    block_size: int = 64
    num_random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: give 1 or more tokens.")
        if self.num_random_blocks < 0:
            raise ValueError(f"num_random_blocks={self.num_random_blocks}: give 0 or more.")

    def is_dense(self, length: int) -> bool:
        """Whether a text of `length` tokens is attended to as a whole."""
        return length <= (5 + 2 * self.num_random_blocks) * self.block_size

    def random_blocks(self, num_layers: int, num_heads: int, num_blocks: int) -> np.ndarray:
        """Returns [layers, H, num_blocks - 2, R] int32; one pattern for training and inference.

        Row i reads R different blocks that are neither in its window nor at an end.
        """
        rng = np.random.default_rng(self.seed)
        shape = (num_layers, num_heads, num_blocks - 2, num_blocks)
        noise = rng.random(shape, np.float32)
        row, block = np.arange(1, num_blocks - 1)[:, None], np.arange(num_blocks)[None, :]
        taken = (np.abs(row - block) <= 1) | (block == 0) | (block == num_blocks - 1)
        noise = np.where(taken, 2.0, noise)
        return np.argsort(noise, axis=-1)[..., : self.num_random_blocks].astype(np.int32)

    def prepare(self, given: Sequences, num_heads: int, num_layers: int) -> BigBirdState:
        """See `SparsePattern.prepare`."""
        length, random = given.keep.shape[1], None
        if not self.is_dense(length):
            num_blocks = -(-length // self.block_size)
            random = jnp.asarray(self.random_blocks(num_layers, num_heads, num_blocks))
        return BigBirdState(given.keep, random, given.values)

    def mix(
        self, heads: Heads, state: BigBirdState, layer: jax.Array | int, drop: Drop | None
    ) -> jax.Array:
        """See `SparsePattern.mix`: n * (5 + R) * block_size scores a head."""
        if state.random is None:
            place = jnp.arange(heads.query.shape[1])
            return full_rows(heads.query, place, heads, state, drop)
        return block_sparse_attention(heads, state, state.random[layer], self.block_size, drop)


def full_rows(
    query: jax.Array, place: jax.Array, heads: Heads, state: BigBirdState, drop: Drop | None
) -> jax.Array:
    """Attention of queries [B, Q, H, D] at `place` [Q] to all tokens."""
    bias = chunks.hidden(state.keep)[:, None, None, None, :]
    if state.values is not None:
        relative = jnp.arange(state.keep.shape[1]) - place[:, None]
        bias = bias + chunks.at_distance(state.values, relative)
    parts = [Keys(heads.key, heads.value, bias), *heads.front]
    return chunks.attend(query[:, None], parts, drop)[:, 0]


def block_sparse_attention(
    heads: Heads,
    state: BigBirdState,
    random: jax.Array,
    block_size: int,
    drop: Drop | None = None,
) -> jax.Array:
    """Returns the mixed values [B, n, H, D].

    Args:
      heads: queries, keys, values.
      state: masks and position bias.
      random: [H, S - 2, R] int: what the rows of blocks 1 ... S - 2 read besides. A block that is
        named twice, or stands in the window or at an end, counts as often.
      block_size: c; S = ceil(n / c) is at least 4.
      drop: of the weights.
    """
    length = heads.query.shape[1]
    query, key, value = (chunks.cut(x, block_size) for x in (heads.query, heads.key, heads.value))
    keep = chunks.cut(state.keep, block_size)
    last = query.shape[1] - 1
    row = jnp.arange(1, last)
    # The end blocks have columns of their own: the window does not show them.
    inner = keep & np.isin(np.arange(last + 1), (0, last), invert=True)[None, :, None]
    ends = [jnp.concatenate([x[:, 0], x[:, last]], axis=1) for x in (key, value, keep)]
    xs = {
        "query": query[:, 1:last],
        "near": [_window(x, last) for x in (key, value, inner)],
        "random": [_picked(x, random) for x in (key, value)],
        "random_keep": _picked_mask(keep, random),
        "random_offset": (random.swapaxes(0, 1) - row[:, None, None])[None],
        "end_offset": jnp.stack([-row, last - row], axis=-1)[None, :, None],
    }
    tiles = None if state.values is None else _tiles(state.values, block_size)

    def step(x: dict[str, Any]) -> jax.Array:
        near = chunks.hidden(x["near"][2])[:, :, None, None, :]
        end = chunks.hidden(ends[2])[:, None, None, None, :]
        far = chunks.hidden(x["random_keep"])[:, :, :, None, :]
        if tiles is not None:
            near = near + _tile_bias(tiles, jnp.arange(-1, 2)[None, None, None])
            end = end + _tile_bias(tiles, x["end_offset"])
            far = far + _tile_bias(tiles, x["random_offset"])
        parts = [Keys(*x["near"][:2], near), Keys(*ends[:2], end), *heads.front]
        parts += [Keys(*x["random"], far)] * (random.shape[2] > 0)
        return chunks.attend(x["query"], parts, drop)

    middle = chunks.over_chunks(step, xs, block_size, drop is not None)
    place = jnp.arange(block_size)
    place = jnp.concatenate([place, place + last * block_size])
    both = jnp.concatenate([query[:, 0], query[:, last]], axis=1)
    full = full_rows(both, place, heads, state, drop)
    first, final = full[:, None, :block_size], full[:, None, block_size:]
    return chunks.join(jnp.concatenate([first, middle, final], axis=1), length)


def _window(blocks: jax.Array, last: int) -> jax.Array:
    """Blocks [B, S, c, ...] with both neighbours, for rows 1 ... last - 1: [B, S - 2, 3 c, ...]."""
    parts = [blocks[:, i : i + last - 1] for i in range(3)]
    return jnp.concatenate(parts, axis=2)


def _picked(blocks: jax.Array, random: jax.Array) -> jax.Array:
    """Blocks [B, S, c, H, D] that each head's rows read: [B, S - 2, R c, H, D]."""
    batch, _, size, heads, width = blocks.shape
    by_head = blocks.transpose(0, 3, 1, 2, 4)
    found = by_head[:, jnp.arange(heads)[:, None, None], random].transpose(0, 2, 3, 4, 1, 5)
    return found.reshape(batch, random.shape[1], random.shape[2] * size, heads, width)


def _picked_mask(keep: jax.Array, random: jax.Array) -> jax.Array:
    """The mask [B, S, c] of the same keys: [B, S - 2, H, R c]."""
    found = keep[:, random].swapaxes(1, 2)
    return found.reshape(*found.shape[:3], random.shape[2] * keep.shape[2])


def _tiles(values: jax.Array, size: int) -> jax.Array:
    """Bias between two blocks -K ... K apart, [H, 2 K + 1, c, c]; farther ones are as the ends."""
    far = values.shape[1] // 2
    most = -(-far // size) + 1
    within = np.arange(size)[None, :] - np.arange(size)[:, None]
    return chunks.at_distance(values, np.arange(-most, most + 1)[:, None, None] * size + within)


def _tile_bias(tiles: jax.Array, offsets: jax.Array) -> jax.Array:
    """Bias [1, S, H, c, L c] of keys in L blocks, `offsets` [1, S, H or 1, L] blocks away."""
    heads, most = tiles.shape[0], tiles.shape[1] // 2
    index = jnp.clip(offsets, -most, most) + most
    found = tiles[jnp.arange(heads)[:, None], index]  # [1, S, H, L, c, c]
    found = found.swapaxes(3, 4)
    return found.reshape(*found.shape[:4], -1)
