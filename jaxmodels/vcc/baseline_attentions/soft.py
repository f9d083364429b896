"""SOFT (arXiv:2110.11945): no softmax, a Gaussian kernel inverted by Newton steps."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core.layers import LayerNorm, partitioned
from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline, segment_length


class SoftAttention(MultiHeadBaseline):
    """G(Q, L) G(L, L)^-1 G(L, Q) V + convolution of V; queries serve as keys.

    G(a, b) = exp(-|a - b|^2 / 2). Landmarks L are GELU(LayerNorm(strided convolution of Q)).

    Attributes:
      num_landmarks: must divide n.
      conv_kernel_size: length of the value convolution, odd; 0 for none.
      iterations: Newton steps of the inverse.
    """

    num_landmarks: int = 64
    conv_kernel_size: int = 0
    iterations: int = 20

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, n, d_model] and 0/1 mask [batch, n] to [batch, n, d_model]."""
        keep = mask[:, None, :, None].astype(jnp.float32)
        query = self.to_heads(x, "query") * keep * (x.shape[-1] // self.num_heads) ** -0.25
        value = self.to_heads(x, "value") * keep
        marks = self._landmarks(query)
        outer = gaussian_kernel(query, marks)
        inverse = newton_inverse(gaussian_kernel(marks, marks), self.iterations)
        out = (outer @ inverse) @ (outer.mT @ value)
        if self.conv_kernel_size:
            out = out + self.value_convolution(value, self.conv_kernel_size)
        return self.from_heads(out)

    def _landmarks(self, query: jax.Array) -> jax.Array:
        batch, heads, length, width = query.shape
        segment = segment_length(length, self.num_landmarks)
        init = partitioned(nn.initializers.normal((segment * width) ** -0.5), (None, None, None))
        kernel = self.param("landmark_kernel", init, (segment, width, width), jnp.float32)
        segments = query.reshape(batch, heads, self.num_landmarks, segment, width)
        marks = jnp.einsum("bhlsi,sio->bhlo", segments, kernel)
        return nn.gelu(LayerNorm(1e-5, name="landmark_norm")(marks), approximate=False)


def gaussian_kernel(a: jax.Array, b: jax.Array) -> jax.Array:
    """exp(-|a_i - b_j|^2 / 2): [..., n, d] and [..., m, d] -> [..., n, m]."""
    # The expanded square can fall below zero by rounding; a distance cannot.
    squared = jnp.square(a).sum(-1)[..., :, None] + jnp.square(b).sum(-1)[..., None, :]
    return jnp.exp(-0.5 * jnp.maximum(squared - 2.0 * a @ b.mT, 0.0))


def newton_inverse(matrix: jax.Array, iterations: int = 20) -> jax.Array:
    """Inverse of symmetric positive matrices [..., m, m] by V <- 2 V - V P V.

    Starts from alpha P with alpha = 2 / (largest row sum)^2, halved at most ten times until
    |I - alpha P P| <= 1.01 in the column-sum norm, and stops where an entry would pass 1e4. The
    norms run over the whole batch, as in the published code.
    """
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def residual(inverse: jax.Array) -> jax.Array:
        return jnp.abs(identity - matrix @ inverse).sum(-2).max()

    def halve(_: int, alpha: jax.Array) -> jax.Array:
        return jnp.where(residual(alpha * matrix) > 1.01, 0.5 * alpha, alpha)

    def step(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inverse, running = state
        following = 2.0 * inverse - inverse @ matrix @ inverse
        running &= jnp.abs(following).max() <= 1e4
        return jnp.where(running, following, inverse), running

    # Reduced matmul precision (the default of TPUs and of recent GPUs) would not converge.
    with jax.default_matmul_precision("highest"):
        alpha = jax.lax.fori_loop(0, 10, halve, 2.0 / jnp.square(matrix.sum(-1).max()))
        start = (alpha * matrix, jnp.asarray(True))
        return jax.lax.fori_loop(0, iterations, step, start)[0]
