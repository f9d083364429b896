"""Longformer (arXiv:2004.05150) as the VCC repository wraps it: window and first tokens."""

import jax
from flax import linen as nn

from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline
from jaxmodels.vcc.baseline_attentions.sparse import Heads, Sequences
from jaxmodels.vcc.baseline_attentions.window import Window, window_attention


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
        if not 0 <= self.num_global <= x.shape[1]:
            raise ValueError(f"num_global is {self.num_global}; give 0 to {x.shape[1]}")
        pattern = Window(self.window, self.num_global)
        query, key, value = (
            self.to_heads(x, name).swapaxes(1, 2) for name in ("query", "key", "value")
        )
        keep = (mask > 0).at[:, : self.num_global].set(True)
        state = pattern.prepare(Sequences(keep), self.num_heads, 1)
        heads = Heads(query * query.shape[-1] ** -0.5, key, value)
        out = window_attention(heads, state) * keep[:, :, None, None]
        return self.from_heads(out.swapaxes(1, 2))
