"""The rows that a VCC layer runs on: out of the compressed form, and back into it (section 3.4).

Symbols as in `compression`; r = p + k b + m - k rows, or p + k b + m where all coarse rows stay.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.core.attention import MASK_BIAS
from jaxmodels.vcc.compression import (
    Layout,
    Selection,
    State,
    compress,
    refine,
    set_rows,
    take_rows,
)

GATE_EPS = 1e-4  # added to gates and token counts before the logarithm
REPLACED_BIAS = -1e9  # key bias of coarse rows whose block is open (static layout)


@struct.dataclass
class Rows:
    """The r rows a VCC layer runs on: opened tokens, coarse rows, VIP slots, in this order.

    Attributes:
      x: X [B, r, d].
      gate: sigma [B, r].
      bias: [B, r] float32, added to the scores of each row as a key.
      positions: [B, r] int32, or None where the layout has none.
    """

    x: jax.Array
    gate: jax.Array
    bias: jax.Array
    positions: jax.Array | None = None


def gather_rows(
    state: State,
    layout: Layout,
    chosen: Selection,
    *,
    scale_correction: bool,
    keep_all: bool,
    exact_counts: bool = False,
    fine: jax.Array | None = None,
) -> Rows:
    """Builds the rows of a layer (section 3.4b, c).

    Args:
      state: before the layer.
      layout: of the sequence.
      chosen: the blocks to open.
      scale_correction: coarse keys count log(b) more.
      exact_counts: of a partly padded block, log(its real tokens) in place of log(b).
      keep_all: keep all m coarse rows and mask the opened ones (static layout), instead of
        dropping them.
      fine: what `compression.refine` returns, where that is done already.

    Returns:
      r = p + k b + m rows, or p + k b + m - k.
    """
    fine = refine(state, chosen.fine) if fine is None else fine
    batch, k, size, d = fine.shape
    coarse, coarse_gate, coarse_mask = state.coarse, chosen.gate, layout.block_mask
    if not keep_all and k:
        coarse, coarse_gate, coarse_mask = (
            take_rows(rows, chosen.rest) for rows in (coarse, coarse_gate, coarse_mask)
        )
    fine_gate = jnp.repeat(take_rows(chosen.gate, chosen.fine), size, axis=1)
    fine_mask = take_rows(layout.mask, chosen.fine).reshape(batch, k * size)
    gate = jnp.concatenate([fine_gate, coarse_gate, jnp.ones_like(layout.vip_mask)], axis=1)
    mask = jnp.concatenate([fine_mask, coarse_mask, layout.vip_mask], axis=1)
    bias = MASK_BIAS * (1.0 - mask) + jnp.log(gate + GATE_EPS)
    first, last = k * size, k * size + coarse.shape[1]
    if scale_correction and exact_counts:
        counts = layout.mask.sum(axis=-1)
        counts = counts if keep_all or not k else take_rows(counts, chosen.rest)
        tokens = jnp.ones_like(bias).at[:, first:last].set(counts)
        bias = bias + jnp.log(tokens + GATE_EPS)
    elif scale_correction:
        tokens = jnp.ones((gate.shape[1],)).at[first:last].set(size)
        bias = bias + jnp.log(tokens + GATE_EPS)
    if keep_all and k:
        opened = jnp.full(chosen.fine.shape, REPLACED_BIAS)
        bias = bias.at[:, first:last].set(set_rows(bias[:, first:last], chosen.fine, opened))
    x = jnp.concatenate([fine.reshape(batch, k * size, d), coarse, state.vip], axis=1)
    return Rows(x, gate, bias, _row_positions(layout, chosen, keep_all))


def _row_positions(layout: Layout, chosen: Selection, keep_all: bool) -> jax.Array | None:
    """Positions [B, r] of the rows of a layer, in the order of `Rows`."""
    places = layout.positions
    if places is None:
        return None
    fine = take_rows(places.fine, chosen.fine)
    fine = fine.reshape(len(fine), -1)
    drop = not keep_all and chosen.fine.shape[1]
    coarse = take_rows(places.coarse, chosen.rest) if drop else places.coarse
    return jnp.concatenate([fine, coarse, places.vip], axis=1)


def close_blocks(
    coarse: jax.Array, difference: jax.Array, index: jax.Array, fine: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns C and D with the means and differences of `fine` [B, k, b, d] at `index` [B, k]."""
    mean, change = compress(fine, mask)
    return set_rows(coarse, index, mean), set_rows(difference, index, change)


def scatter_rows(
    state: State,
    layout: Layout,
    chosen: Selection,
    y: jax.Array,
    write_back: Callable[..., tuple[jax.Array, jax.Array]] = close_blocks,
) -> State:
    """Writes the rows of a layer back (section 3.4e); the inverse of `gather_rows`.

    Args:
      state: before the layer.
      layout: of the sequence.
      chosen: the blocks that were open.
      y: Y [B, r, d], the rows after the layer.
      write_back: what `close_blocks` does.

    Returns:
      the state with VIP and coarse rows replaced, and the means and differences of the k opened
      blocks computed anew; the differences of all other blocks are untouched.
    """
    batch, k = chosen.fine.shape
    size, d = state.difference.shape[2:]
    first, last = k * size, y.shape[1] - state.vip.shape[1]
    coarse = y[:, first:last]
    if last - first < state.coarse.shape[1]:
        coarse = set_rows(state.coarse, chosen.rest, coarse)
    opened, mask = y[:, :first].reshape(batch, k, size, d), take_rows(layout.mask, chosen.fine)
    banks = write_back(coarse, state.difference, chosen.fine, opened, mask)
    return State(y[:, last:], *banks)


def last_rows(state: State, layout: Layout, fine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The compressed states as a decoder reads them: those rows of the last layer that count.

    Args:
      state: after the last layer.
      layout: of the sequence.
      fine: [B, k] int32, blocks that it had open; -1 names the last one, which is padding.

    Returns:
      [B, k b + m + p, d], and a key bias [B, k b + m + p] float32: a block mean counts as many
      tokens as are real in it; padding and the means of open blocks are hidden.
    """
    blocks = layout.mask.shape[1]
    fine = jnp.where(fine < 0, blocks - 1, fine)
    ones = jnp.ones(layout.mask.shape[:2], jnp.float32)
    chosen = Selection(ones, ones, fine, fine, ones)
    options = {"scale_correction": True, "exact_counts": True, "keep_all": True}
    rows = gather_rows(state, layout, chosen, **options)
    return rows.x, rows.bias
