"""Nystromformer (arXiv:2102.03902): softmax attention by landmarks, iterated pseudo-inverse."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.vcc.baseline_attentions.projections import (
    MultiHeadBaseline,
    masked_softmax,
    segment_length,
)


class NystromformerAttention(MultiHeadBaseline):
    """softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V + convolution of V.

    Q~ and K~ are means of equal segments (padding counts as zero). With as many landmarks as
    tokens this is ordinary attention.

    Attributes:
      num_landmarks: must divide n.
      conv_kernel_size: length of the value convolution, odd; 0 for none.
      iterations: of the pseudo-inverse.
    """

    num_landmarks: int = 64
    conv_kernel_size: int = 0
    iterations: int = 6

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, n, d_model] and 0/1 mask [batch, n] to [batch, n, d_model]."""
        keep = mask[:, None, :, None].astype(jnp.float32)
        key_keep = mask[:, None, None, :] > 0
        query, key = self.to_heads(x, "query"), self.to_heads(x, "key")
        scale = query.shape[-1] ** -0.25
        query, key = query * keep * scale, key * keep * scale
        value = self.to_heads(x, "value")
        batch, heads, length, width = query.shape
        segment = segment_length(length, self.num_landmarks)
        if segment == 1:
            out = masked_softmax(query @ key.mT, key_keep) @ value
        else:
            shape = (batch, heads, self.num_landmarks, segment, width)
            query_marks, key_marks = query.reshape(shape).mean(3), key.reshape(shape).mean(3)
            left = jax.nn.softmax(query @ key_marks.mT, axis=-1)
            middle = jax.nn.softmax(query_marks @ key_marks.mT, axis=-1)
            right = masked_softmax(query_marks @ key.mT, key_keep)
            out = (left @ pseudo_inverse(middle, self.iterations)) @ (right @ value)
        if self.conv_kernel_size:
            out = out + self.value_convolution(value * keep, self.conv_kernel_size)
        return self.from_heads(out)


def pseudo_inverse(matrix: jax.Array, iterations: int = 6) -> jax.Array:
    """Moore-Penrose inverse of row-stochastic matrices [..., m, m] by a cubic iteration.

    The start is K^T over the largest column sum of the whole batch, as in the published code:
    one example's start therefore depends on the others; after convergence the result does not.
    """
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    inverse = matrix.mT / matrix.sum(-2).max()
    # Reduced matmul precision (the default of TPUs and of recent GPUs) would not converge.
    with jax.default_matmul_precision("highest"):
        for _ in range(iterations):
            product = matrix @ inverse
            inner = 15 * identity - product @ (7 * identity - product)
            inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse
