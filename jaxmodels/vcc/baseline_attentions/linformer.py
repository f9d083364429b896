"""Linformer (arXiv:2006.04768): keys and values projected along the length to k' rows."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core.layers import partitioned
from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline


class LinformerAttention(MultiHeadBaseline):
    """softmax(Q (E K)^T / sqrt(head_dim)) (E V), one E [h, k', n] for keys and values.

    Attributes:
      projected_length: k'.
      max_length: n, fixed by the shape of E; other lengths are refused.
    """

    projected_length: int = 256
    max_length: int = 4096

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, n, d_model] and 0/1 mask [batch, n] to [batch, n, d_model]."""
        if x.shape[1] != self.max_length:
            raise ValueError(
                f"the length projection was built for {self.max_length} tokens, got {x.shape[1]}: "
                "pad the input"
            )
        shape = (self.num_heads, self.projected_length, self.max_length)
        init = nn.initializers.normal(self.projected_length**-0.5)
        project = self.param("E", partitioned(init, ("heads", None, "length")), shape, jnp.float32)
        keep = mask[:, None, :, None].astype(jnp.float32)
        query = self.to_heads(x, "query")
        keys = jnp.einsum("hkn,bhnd->bhkd", project, self.to_heads(x, "key") * keep)
        values = jnp.einsum("hkn,bhnd->bhkd", project, self.to_heads(x, "value") * keep)
        scores = jnp.einsum("bhnd,bhkd->bhnk", query, keys) * query.shape[-1] ** -0.5
        return self.from_heads(jax.nn.softmax(scores, axis=-1) @ values)
