"""A sliding window and global tokens: Longformer on RoBERTa, LED's encoder on T5."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.vcc.baseline_attentions import chunks
from jaxmodels.vcc.baseline_attentions.chunks import Drop, Keys
from jaxmodels.vcc.baseline_attentions.sparse import Heads, Sequences, SparsePattern

GLOBAL_TOKENS = ("first", "vip")


@struct.dataclass
class WindowState:
    """What all layers share.

    Attributes:
      keep: [B, n] bool, keys that the window shows: real and not global.
      real: [B, n] bool.
      index: [B, G] int, where the global tokens stand.
      chosen: [B, G] bool, False on slots without one.
      band: [H or 1, c, 3 c] bias within the window.
      values: bias of each distance, or None.
      leading: the global tokens are the first ones: slices do, without gather and scatter.
    """

    keep: jax.Array
    real: jax.Array
    index: jax.Array
    chosen: jax.Array
    band: jax.Array
    values: jax.Array | None = None
    leading: bool = struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class Window(SparsePattern):
    """Every token sees window / 2 tokens on each side and the global tokens, which see everything.

    Attributes:
      window: whole window, an even number: 512 for Longformer, 1024 for LED.
      num_global: slots for global tokens; 0 for none.
      global_tokens: the "first" tokens of the sequence, or the "vip" tokens (in text order, as
        many as there are slots).

    Raises:
      ValueError: an odd or empty window, or a setting that is not known.
    """

    window: int = 512
    num_global: int = 1
    global_tokens: str = "first"

    def __post_init__(self) -> None:
        if self.window < 2 or self.window % 2:
            raise ValueError(f"window={self.window}: give a positive even number of tokens.")
        if self.num_global < 0:
            raise ValueError(f"num_global={self.num_global}: give 0 or more.")
        if self.global_tokens not in GLOBAL_TOKENS:
            raise ValueError(f"global_tokens={self.global_tokens!r}: use one of {GLOBAL_TOKENS}.")

    def prepare(self, given: Sequences, num_heads: int, num_layers: int) -> WindowState:
        """See `SparsePattern.prepare`.

        Raises:
          ValueError: the global tokens are the VIP tokens, and there is no VIP mask.
        """
        batch, length = given.keep.shape
        count = min(self.num_global, length)
        wanted = given.keep
        leading = self.global_tokens == "first" or not count
        if not leading:
            if given.vip is None:
                raise ValueError("global_tokens='vip' needs a vip_mask: give [batch, length].")
            wanted = given.vip & given.keep
            index = jnp.argsort(~wanted, axis=1, stable=True)[:, :count]
        else:
            index = jnp.broadcast_to(jnp.arange(count), (batch, count))
        chosen = jnp.take_along_axis(wanted, index, axis=1)
        rows = jnp.arange(batch)[:, None]
        is_global = jnp.zeros((batch, length), bool).at[rows, index].set(chosen)
        side = self.window // 2
        band = chunks.band_bias(min(side, length), side, given.values)
        return WindowState(
            given.keep & ~is_global, given.keep, index, chosen, band, given.values, leading
        )

    def mix(
        self, heads: Heads, state: WindowState, layer: jax.Array | int, drop: Drop | None
    ) -> jax.Array:
        """See `SparsePattern.mix`."""
        return window_attention(heads, state, drop)


def window_attention(heads: Heads, state: WindowState, drop: Drop | None = None) -> jax.Array:
    """Returns the mixed values [B, n, H, D]; n * (3 / 2 window + G) scores a head."""
    chunk, length = state.band.shape[1], heads.query.shape[1]
    count, rows = state.index.shape[1], jnp.arange(state.index.shape[0])[:, None]

    def taken(x: jax.Array) -> jax.Array:
        return x[:, :count] if state.leading else x[rows, state.index]

    key, value = taken(heads.key), taken(heads.value)
    query = chunks.cut(heads.query, chunk)
    xs = {
        "query": query,
        "key": chunks.with_neighbours(heads.key, chunk),
        "value": chunks.with_neighbours(heads.value, chunk),
        "keep": chunks.with_neighbours(state.keep, chunk),
        "place": chunks.cut(jnp.arange(length)[None], chunk),
    }

    def step(x: dict[str, jax.Array]) -> jax.Array:
        bias = state.band + chunks.hidden(x["keep"])[:, :, None, None, :]
        parts = [Keys(x["key"], x["value"], bias), *heads.front]
        if count:
            bias = chunks.hidden(state.chosen)[:, None, None, None, :]
            if state.values is not None:
                relative = state.index[:, None, None, :] - x["place"][..., None]
                bias = bias + jnp.moveaxis(chunks.at_distance(state.values, relative), 0, 2)
            parts.append(Keys(key, value, bias))
        return chunks.attend(x["query"], parts, drop)

    out = chunks.join(chunks.over_chunks(step, xs, chunk, drop is not None), length)
    if not count:
        return out
    full = _global_rows(taken(heads.query), heads, state, drop)
    full = jnp.where(state.chosen[:, :, None, None], full, taken(out))
    if state.leading:
        return jnp.concatenate([full, out[:, count:]], axis=1)
    return out.at[rows, state.index].set(full)


def _global_rows(
    query: jax.Array, heads: Heads, state: WindowState, drop: Drop | None
) -> jax.Array:
    """Attention of the global tokens [B, G, H, D] to all tokens."""
    bias = chunks.hidden(state.real)[:, None, None, None, :]
    if state.values is not None:
        relative = jnp.arange(heads.key.shape[1]) - state.index[..., None]
        bias = bias + chunks.at_distance(state.values, relative).swapaxes(0, 1)[:, None]
    parts = [Keys(heads.key, heads.value, bias), *heads.front]
    return chunks.attend(query[:, None], parts, drop)[:, 0]
