"""LongT5 (arXiv:2112.07916): a local window, and summaries of all blocks that every token reads."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.vcc.baseline_attentions import chunks
from jaxmodels.vcc.baseline_attentions.chunks import Drop, Keys
from jaxmodels.vcc.baseline_attentions.sparse import Heads, Sequences, SparsePattern


@struct.dataclass
class LongT5State:
    """What all layers share.

    Attributes:
      keep: [B, n] bool.
      last: [B] int, the last whole block; -1 where there is none.
      band: [H or 1, c, 3 c] bias within the window.
      side_values: bias of each distance in blocks, or None.
    """

    keep: jax.Array
    last: jax.Array
    band: jax.Array
    side_values: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LongT5(SparsePattern):
    """Every token sees `radius` tokens on each side and, with a block size, a summary a block.

    A summary is the norm (`global_norm`, its own) of the sum of a block's tokens, through the
    layer's key and value projections. Tokens behind the last whole block are summed into that
    block; a text shorter than one block has no summaries.

    Attributes:
      radius: tokens seen on each side.
      global_block_size: tokens a summary; 0 for LongT5's plain local attention.

    Raises:
      ValueError: a negative size.
    """

    radius: int = 127
    global_block_size: int = 16

    def __post_init__(self) -> None:
        for name in ("radius", "global_block_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more tokens.")

    @property
    def summarises(self) -> bool:
        """See `SparsePattern.summarises`."""
        return self.global_block_size > 0

    def prepare(self, given: Sequences, num_heads: int, num_layers: int) -> LongT5State:
        """See `SparsePattern.prepare`."""
        block, length = self.global_block_size, given.keep.shape[1]
        last = jnp.full(given.keep.shape[:1], -1)
        if block:
            last += given.keep[:, block - 1 :: block].sum(1)
        band = chunks.band_bias(min(self.radius + 1, length), self.radius, given.values)
        return LongT5State(given.keep, last, band, given.side_values)

    def summaries(self, x: jax.Array, state: LongT5State) -> jax.Array:
        """See `SparsePattern.summaries`: [B, n // block size, d] float32."""
        count = x.shape[1] // self.global_block_size
        x = jnp.where(state.keep[..., None], x.astype(jnp.float32), 0.0)
        sums = chunks.cut(x, self.global_block_size).sum(2)
        behind = (jnp.arange(sums.shape[1]) > state.last[:, None])[..., None]
        rest = jnp.where(behind, sums, 0.0).sum(1, keepdims=True)
        is_last = (jnp.arange(sums.shape[1]) == state.last[:, None])[..., None]
        return (jnp.where(behind, 0.0, sums) + is_last * rest)[:, :count]

    def mix(
        self, heads: Heads, state: LongT5State, layer: jax.Array | int, drop: Drop | None
    ) -> jax.Array:
        """See `SparsePattern.mix`: n * (3 radius + 3 + n / block size) scores a head."""
        chunk, length = state.band.shape[1], heads.query.shape[1]
        xs = {
            "query": chunks.cut(heads.query, chunk),
            "key": chunks.with_neighbours(heads.key, chunk),
            "value": chunks.with_neighbours(heads.value, chunk),
            "keep": chunks.with_neighbours(state.keep, chunk),
            "place": chunks.cut(jnp.arange(length)[None], chunk),
        }

        def step(x: dict[str, jax.Array]) -> jax.Array:
            bias = state.band + chunks.hidden(x["keep"])[:, :, None, None, :]
            parts = [Keys(x["key"], x["value"], bias), *heads.front]
            if heads.side is not None and heads.side.key.shape[1]:
                parts.append(heads.side.replace(bias=self._side_bias(x["place"], heads, state)))
            return chunks.attend(x["query"], parts, drop)

        return chunks.join(chunks.over_chunks(step, xs, chunk, drop is not None), length)

    def _side_bias(self, place: jax.Array, heads: Heads, state: LongT5State) -> jax.Array:
        """Bias [B, S, H or 1, c, G] between tokens at `place` [1, S, c] and the summaries."""
        number = jnp.arange(heads.side.key.shape[1])
        bias = chunks.hidden(number <= state.last[:, None])[:, None, None, None, :]
        if state.side_values is None:
            return bias
        # Tokens of one block share their row: look it up once for all of them.
        chunk = place.shape[2]
        together = math.gcd(chunk, self.global_block_size)
        own = place[..., ::together] // self.global_block_size
        own = jnp.minimum(own, state.last[:, None, None])
        found = chunks.at_distance(state.side_values, number - own[..., None])
        return bias + jnp.repeat(jnp.moveaxis(found, 0, 2), together, axis=3)
