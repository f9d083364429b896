"""Longformer (arXiv:2004.05150): a sliding window plus a few global tokens, in linear memory."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline, masked_softmax


class LongformerAttention(MultiHeadBaseline):
    """Every token sees window / 2 tokens on each side and the global tokens.

    The first `num_global` tokens see everything and are never treated as padding. Local and global
    attention share their projections, as in the VCC repository (the published Longformer has a
    second set for the global rows).

    Attributes:
      window: whole window, an even number.
      num_global: global tokens at the front; 0 for none.
    """

    window: int = 512
    num_global: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, n, d_model] and 0/1 mask [batch, n] to [batch, n, d_model]."""
        if self.window < 2 or self.window % 2:
            raise ValueError(f"window is {self.window}; give a positive even number")
        if not 0 <= self.num_global <= x.shape[1]:
            raise ValueError(f"num_global is {self.num_global}; give 0 to {x.shape[1]}")
        query, key = self.to_heads(x, "query"), self.to_heads(x, "key")
        query = query * query.shape[-1] ** -0.5
        value = self.to_heads(x, "value")
        keep = (mask > 0).at[:, : self.num_global].set(True)
        out = window_attention(query, key, value, keep, self.window // 2, self.num_global)
        rows = query[:, :, : self.num_global] @ key.mT
        full = masked_softmax(rows, keep[:, None, None, :]) @ value
        out = jnp.concatenate([full, out[:, :, self.num_global :]], axis=2)
        return self.from_heads(out * keep[:, None, :, None])


def window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keep: jax.Array,
    side: int,
    num_global: int,
) -> jax.Array:
    """Attention of every token to `side` tokens on each side and to the first `num_global` ones.

    Args:
      query, key, value: [batch, h, n, head_dim], query scaled.
      keep: [batch, n] bool, False on padding.
      side: half of the window.
      num_global: columns that every query sees once, inside its window or not.

    Returns:
      [batch, h, n, head_dim]. Works on chunks of `side` queries against three chunks of keys, so
      that memory is n * (3 * side + num_global) scores a head.
    """
    batch, heads, length, width = query.shape
    chunks = -(-length // side)
    tail = chunks * side - length

    def around(x: jax.Array, axis: int) -> jax.Array:
        """Chunks of the padded axis with both neighbours: [..., chunks, 3 * side, ...]."""
        pads = [(0, 0)] * x.ndim
        pads[axis] = (side, side + tail)
        x = jnp.pad(x, pads)
        x = x.reshape(*x.shape[:axis], chunks + 2, side, *x.shape[axis + 1 :])
        parts = [jax.lax.slice_in_dim(x, i, i + chunks, axis=axis) for i in range(3)]
        return jnp.concatenate(parts, axis=axis + 1)

    padded = jnp.pad(query, ((0, 0), (0, 0), (0, tail), (0, 0)))
    queries = padded.reshape(batch, heads, chunks, side, width)
    position = jnp.arange(chunks * side).reshape(chunks, side, 1)
    key_position = jnp.arange(chunks)[:, None] * side + jnp.arange(-side, 2 * side)[None, :]
    near = jnp.abs(position - key_position[:, None, :]) <= side
    # Global keys have their own columns below: each key is counted once.
    near &= (key_position >= num_global)[:, None, :]
    local_keep = near[None] & around(keep, 1)[:, :, None, :]
    local = jnp.einsum("bhcqd,bhckd->bhcqk", queries, around(key, 2))
    scores = jnp.where(local_keep[:, None], local, -1e9)
    shared = jnp.einsum("bhcqd,bhgd->bhcqg", queries, key[:, :, :num_global])
    probs = jax.nn.softmax(jnp.concatenate([scores, shared], axis=-1), axis=-1)
    out = jnp.einsum("bhcqk,bhckd->bhcqd", probs[..., : 3 * side], around(value, 2))
    out = out + jnp.einsum("bhcqg,bhgd->bhcqd", probs[..., 3 * side :], value[:, :, :num_global])
    return out.reshape(batch, heads, chunks * side, width)[:, :, :length]
