"""The compressed form of a sequence: enter it, open blocks, close them, leave it (section 3.2-3.5).

Symbols: B batch, n tokens, p VIP slots, b block size, m = (n - p) / b blocks, k blocks opened,
d width. Everything here is pure, without parameters, and linear in the states, so that its
gradient needs indices and masks only and never saves the bank of differences.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

MEAN_EPS = 1e-4  # the official mean divides by count + 1e-4
SLOT_EPS = 1e-5  # floor of a block's attention before the logarithm


@struct.dataclass
class State:
    """What the VCC layers pass on.

    Attributes:
      vip: P [B, p, d], VIP states at full resolution.
      coarse: C [B, m, d], block means.
      difference: D [B, m, b, d], C - x as of the last time the block was open.
    """

    vip: jax.Array
    coarse: jax.Array
    difference: jax.Array


@struct.dataclass
class Positions:
    """Where in the text the rows stand, int32; relative position biases need it.

    Attributes:
      vip: [B, p].
      fine: [B, m, b], of the tokens in blocks.
      coarse: [B, m], of whole blocks.
    """

    vip: jax.Array
    fine: jax.Array
    coarse: jax.Array


@struct.dataclass
class Layout:
    """What stays the same in every VCC layer.

    Attributes:
      order: [B, n] int32, token index of each row: VIP slots first, then the blocks.
      vip_mask: [B, p] float32, 1 on real tokens in VIP slots.
      importance: [B, p] float32, 1 on slots that hold VIP tokens and vote.
      mask: M [B, m, b] float32, 1 on real tokens in blocks.
      positions: of all rows, or None.
    """

    order: jax.Array
    vip_mask: jax.Array
    importance: jax.Array
    mask: jax.Array
    positions: Positions | None = None

    @property
    def block_mask(self) -> jax.Array:
        """[B, m] float32, 1 on blocks with a real token."""
        return self.mask.max(axis=-1)


@struct.dataclass
class Selection:
    """Which blocks a layer opens.

    Attributes:
      weights: A [B, h, p, m], softmax of VIP queries over block keys.
      scores: s [B, m], log of the averaged weights.
      fine: [B, k] int32, opened blocks, best first.
      rest: [B, m - k] int32, blocks left coarse.
      gate: sigma [B, m], value 1; straight-through gradient into softmax(scores).
    """

    weights: jax.Array
    scores: jax.Array
    fine: jax.Array
    rest: jax.Array
    gate: jax.Array


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[i, index[i]] for every example: [B, m, ...], [B, k] -> [B, k, ...]."""
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="promise_in_bounds"))(x, index)


def set_rows(x: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns x with x[i, index[i]] = rows[i]; the indices of an example are distinct."""

    def one(x: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
        return x.at[index].set(rows, mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(one)(x, index, rows.astype(x.dtype))


def compress(fine: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Block mean and differences (section 3.3), both from float32 sums.

    Args:
      fine: [..., b, d] token states of a block.
      mask: [..., b], 1 on real tokens.

    Returns:
      mean c [..., d] = sum(fine * mask) / (count + 1e-4), and c - fine * mask [..., b, d]
      (masked rows included, which read back as 0).
    """
    mask = mask.astype(jnp.float32)[..., None]
    masked = fine.astype(jnp.float32) * mask
    mean = masked.sum(axis=-2) / (mask.sum(axis=-2) + MEAN_EPS)
    difference = mean[..., None, :] - masked
    return mean.astype(fine.dtype), difference.astype(fine.dtype)


def decompress(coarse: jax.Array, difference: jax.Array) -> jax.Array:
    """Returns the tokens of blocks: C [..., d] - D [..., b, d] -> [..., b, d]."""
    return coarse[..., None, :] - difference


def block_positions(positions: jax.Array) -> jax.Array:
    """Returns each block's position: mean over [..., b] rounded half to even, int32."""
    return jnp.round(positions.astype(jnp.float32).mean(axis=-1)).astype(jnp.int32)


def inverse(order: jax.Array) -> jax.Array:
    """Returns the inverse of permutations [B, n] int32; no sort, which TPUs compile slowly."""
    places = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=jnp.int32), order.shape)
    return set_rows(jnp.zeros_like(places), order, places)


def sort_by_importance(vip_mask: jax.Array) -> jax.Array:
    """Returns token indices, VIPs first in text order, then the rest: [B, n] -> [B, n] int32."""
    vip = (vip_mask > 0).astype(jnp.int32)
    before, rest = jnp.cumsum(vip, axis=-1), jnp.cumsum(1 - vip, axis=-1)
    return inverse(jnp.where(vip > 0, before - 1, before[:, -1:] + rest - 1))


def enter(
    x: jax.Array,
    mask: jax.Array,
    vip_mask: jax.Array,
    num_vip: int,
    block_size: int,
    positions: jax.Array | None = None,
    close: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = compress,
) -> tuple[State, Layout]:
    """Compresses a sequence (section 3.2).

    With fewer VIPs than slots the free slots hold the earliest other tokens, which do not vote;
    with more, the last VIPs in text order become ordinary tokens.

    Args:
      x: [B, n, d]; n - num_vip is a multiple of block_size.
      mask: [B, n], 1 on real tokens.
      vip_mask: [B, n], 1 on VIP tokens.
      num_vip: p.
      block_size: b.
      positions: [B, n] int, where the tokens stand; only models with relative positions need it.
      close: what `compress` does, of all blocks.

    Returns:
      the state, and the layout that `leave` and the layers need.

    Raises:
      ValueError: n does not fit p and b.
    """
    batch, n, d = x.shape
    if n < num_vip or (n - num_vip) % block_size:
        raise ValueError(
            f"length n={n} with p={num_vip} VIP slots leaves {n - num_vip} tokens, not a multiple "
            f"of block size b={block_size}; pad with compression.padded_length."
        )
    order = sort_by_importance(vip_mask)
    mask = mask.astype(jnp.float32)
    rows = take_rows(x * mask[..., None].astype(x.dtype), order)
    row_mask = jnp.take_along_axis(mask, order, axis=1)
    importance = jnp.take_along_axis(vip_mask.astype(jnp.float32), order, axis=1)
    blocks = (n - num_vip) // block_size
    layout = Layout(
        order=order,
        vip_mask=row_mask[:, :num_vip],
        importance=importance[:, :num_vip],
        mask=row_mask[:, num_vip:].reshape(batch, blocks, block_size),
    )
    if positions is not None:
        placed = jnp.take_along_axis(positions.astype(jnp.int32), order, axis=1)
        within = placed[:, num_vip:].reshape(batch, blocks, block_size)
        placed = Positions(placed[:, :num_vip], within, block_positions(within))
        layout = layout.replace(positions=placed)
    fine = rows[:, num_vip:].reshape(batch, blocks, block_size, d)
    coarse, difference = close(fine, layout.mask)
    return State(rows[:, :num_vip], coarse, difference), layout


def open_all(coarse: jax.Array, difference: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the tokens [B, m, b, d] of all blocks; padding becomes exactly 0."""
    return decompress(coarse, difference) * mask[..., None]


def leave(
    state: State,
    layout: Layout,
    open_blocks: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = open_all,
) -> jax.Array:
    """Decompresses to text order (section 3.5): [B, n, d]; padding in blocks becomes exactly 0.

    Args:
      state: after the last layer.
      layout: of the sequence.
      open_blocks: what `open_all` does.
    """
    batch, blocks, size, d = state.difference.shape
    tokens = open_blocks(state.coarse, state.difference, layout.mask)
    rows = jnp.concatenate([state.vip, tokens.reshape(batch, blocks * size, d)], axis=1)
    return take_rows(rows, inverse(layout.order))


def padded_length(n: int, num_vip: int, block_size: int) -> int:
    """Returns the shortest legal length >= n: p plus at least one whole block."""
    return num_vip + block_size * max(1, -(-(n - num_vip) // block_size))


def select(
    weights: jax.Array,
    layout: Layout,
    num_fine: int,
    *,
    order_by: jax.Array | None = None,
    explored: jax.Array | None = None,
    straight_through: bool = True,
    vote_average: str = "slots",
    open_share: float = 1.0,
) -> Selection:
    """Chooses the blocks to open (section 3.4a).

    Args:
      weights: A [B, h, p, m], softmax over blocks.
      layout: of the sequence.
      num_fine: k <= m.
      order_by: [B, m] scores that replace s in the ordering (random selection, exploration).
      explored: [B] bool, where `order_by` counts; everywhere if None.
      straight_through: the gates carry gradient into softmax(s); random selection has none.
      vote_average: a block's votes are divided by p ("slots"), or by the VIPs there are ("vips").
      open_share: below 1, blocks are opened, best first, until they have this share of the votes
        (all k where `order_by` counts). Slots left over name the last block, which is padding.

    Returns:
      the selection; ties go to the lowest block index.
    """
    voted = jnp.einsum("bp,bpm->bm", layout.importance, weights.mean(axis=1))
    voters: Any = weights.shape[2]
    if vote_average == "vips":
        voters = jnp.maximum(layout.importance.sum(axis=-1, keepdims=True), 1.0)
    scores = jnp.log(voted / voters + SLOT_EPS)
    ordering = jax.lax.stop_gradient(scores)
    if order_by is not None:
        where = True if explored is None else explored[:, None]
        ordering = jnp.where(where, order_by, ordering)
    ranked = jnp.argsort(-ordering, axis=-1, stable=True).astype(jnp.int32)
    fine, rest = ranked[:, :num_fine], ranked[:, num_fine:]
    if open_share < 1.0:
        votes = jnp.take_along_axis(voted, fine, axis=1)
        before = jnp.cumsum(votes, axis=1) - votes
        needed = before < open_share * voted.sum(axis=1, keepdims=True)
        needed |= voted.max(axis=1, keepdims=True) == 0  # no VIP: all are as good
        if order_by is not None:
            needed |= True if explored is None else explored[:, None]
        fine = jnp.where(needed, fine, scores.shape[1] - 1)
    gate = jnp.ones_like(scores)
    if straight_through:
        share = jax.nn.softmax(scores, axis=-1)
        opened = set_rows(jnp.zeros_like(scores), fine, jnp.ones_like(fine, scores.dtype))
        signed = jnp.where(opened > 0, share, 1.0 - share)
        gate = 1.0 + (signed - jax.lax.stop_gradient(signed))  # exactly 1
    return Selection(weights, scores, fine, rest, gate)


def random_order(rng: jax.Array, block_mask: jax.Array) -> jax.Array:
    """Returns uniform noise [B, m] with the masked blocks last."""
    noise = jax.random.uniform(rng, block_mask.shape)
    return noise - 2.0 * (1.0 - block_mask)


def refine(state: State, fine: jax.Array) -> jax.Array:
    """Opens blocks (section 3.4b): indices [B, k] -> token states [B, k, b, d]."""
    return decompress(take_rows(state.coarse, fine), take_rows(state.difference, fine))
