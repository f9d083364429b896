"""What the attention baselines share: head projections, value convolution, norm in front."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core.layers import Dense, LayerNorm, partitioned


class MultiHeadBaseline(nn.Module):
    """Base of the baselines: projects to heads and back.

    Attributes:
      num_heads: h; must divide the width of the input.
      output_projection: ends with a Dense `out`. The post-norm blocks of the VCC repository bring
        their own, so that its attention modules have none.
      dtype: of the projections; scores, softmax and inverses are always float32.
    """

    num_heads: int
    output_projection: bool = False
    dtype: jnp.dtype = jnp.float32

    def to_heads(self, x: jax.Array, name: str) -> jax.Array:
        """Projects [batch, n, d] to float32 heads [batch, h, n, d / h]."""
        batch, length, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide the width {width}")
        y = Dense(width, ("embed", "heads"), dtype=self.dtype, name=name)(x)
        y = y.reshape(batch, length, self.num_heads, width // self.num_heads)
        return y.transpose(0, 2, 1, 3).astype(jnp.float32)

    def from_heads(self, x: jax.Array) -> jax.Array:
        """Joins heads [batch, h, n, head_dim] to [batch, n, d], projected if so configured."""
        batch, heads, length, head_dim = x.shape
        x = x.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim).astype(self.dtype)
        if self.output_projection:
            x = Dense(x.shape[-1], ("heads", "embed"), dtype=self.dtype, name="out")(x)
        return x

    def value_convolution(self, values: jax.Array, kernel_size: int) -> jax.Array:
        """Depthwise convolution along the length, one odd kernel [kernel_size, h] for all channels.

        values: [batch, h, n, head_dim]; zero padding keeps n.
        """
        if kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size is {kernel_size}; give an odd number, 0 for none")
        init = partitioned(nn.initializers.normal(0.02), (None, "heads"))
        kernel = self.param("conv", init, (kernel_size, self.num_heads), jnp.float32)
        batch, heads, length, channels = values.shape
        # One group a head: [batch * channels, n, h] with h input features, depthwise.
        folded = values.transpose(0, 3, 2, 1).reshape(batch * channels, length, heads)
        half = kernel_size // 2
        out = jax.lax.conv_general_dilated(
            folded,
            kernel[:, None, :],
            window_strides=(1,),
            padding=((half, half),),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=heads,
            precision=jax.lax.Precision.HIGHEST,
        )
        return out.reshape(batch, channels, length, heads).transpose(0, 3, 2, 1)


class PreNormAttention(nn.Module):
    """Layer norm, then a baseline: the attention branch of a pre-norm block (without residual).

    Attributes:
      attention: the baseline, with `output_projection=True`.
      eps: of the layer norm.
    """

    attention: MultiHeadBaseline
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, n, d_model] and 0/1 mask [batch, n] to [batch, n, d_model]."""
        normed = LayerNorm(self.eps, self.attention.dtype, name="attention_norm")(x)
        return self.attention(normed, mask)


def masked_softmax(scores: jax.Array, keep: jax.Array) -> jax.Array:
    """Softmax over the last axis of scores where `keep` (bool, broadcastable) is True."""
    return jax.nn.softmax(jnp.where(keep, scores, -1e9), axis=-1)


def segment_length(length: int, num_landmarks: int) -> int:
    """Tokens a landmark stands for; ValueError unless landmarks divide the length."""
    if num_landmarks < 1 or length % num_landmarks:
        raise ValueError(
            f"num_landmarks={num_landmarks} must divide the length {length}: pad the input or "
            "choose a divisor"
        )
    return length // num_landmarks
