"""The head of a language model: a kernel of its own where it is not the word table."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import layers


class LMHead(nn.Module):
    """The kernel [d_model, vocab_size] of a head without bias.

    Attributes:
      d_model: rows.
      vocab_size: columns.
      kernel_init: initialiser.
    """

    d_model: int
    vocab_size: int
    kernel_init: layers.Initializer = layers.normal(0.02)

    def setup(self) -> None:
        init = layers.partitioned(self.kernel_init, ("embed", "vocab"))
        self.kernel = self.param("kernel", init, (self.d_model, self.vocab_size), jnp.float32)


def logits(hidden: jax.Array, kernel: jax.Array | layers.Turned, dtype: Any) -> jax.Array:
    """Returns hidden [..., d_model] kernel [d_model, vocab], the product in `dtype`; float32."""
    return layers.product(hidden.astype(dtype), kernel.astype(dtype))
