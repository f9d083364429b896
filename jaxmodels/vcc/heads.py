"""Heads of the RoBERTa tasks: multiple choice, classification, HotpotQA (section 6)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core import layers


class MultipleChoiceHead(nn.Module):
    """One score a candidate: [B, c, d] states at the candidates' tokens -> [B, c] float32."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            layers.partitioned(nn.initializers.normal(0.02), ("embed", None)),
            (states.shape[-1], 1),
            jnp.float32,
        )
        return (states @ kernel)[..., 0]


class ClassificationHead(nn.Module):
    """out_proj(tanh(dense(first token))): [B, n, d] -> [B, num_classes] float32 logits."""

    num_classes: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = layers.Dense(hidden.shape[-1], ("embed", "mlp"), name="dense")(hidden[:, 0])
        return layers.Dense(self.num_classes, ("embed", None), name="out_proj")(jnp.tanh(x))


class TwoLayerHead(nn.Module):
    """out_proj(gelu(dense(x))): [..., d] -> [..., num_classes] float32 logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = layers.Dense(x.shape[-1], ("embed", "mlp"), name="dense")(x)
        x = nn.gelu(x, approximate=False)
        return layers.Dense(self.num_classes, ("embed", None), name="out_proj")(x)


@struct.dataclass
class HotpotQALogits:
    """Logits of the HotpotQA heads over every token; read at the positions a loss asks for.

    Attributes:
      paragraph: [B, n, 2].
      sentence: [B, n, 2].
      answer_type: [B, 3] at the first token: no, yes, span.
      span: [B, n, 2]: start, end.
    """

    paragraph: jax.Array
    sentence: jax.Array
    answer_type: jax.Array
    span: jax.Array


class HotpotQAHead(nn.Module):
    """Paragraph, sentence, answer-type and span heads: [B, n, d] -> `HotpotQALogits`."""

    @nn.compact
    def __call__(self, hidden: jax.Array) -> HotpotQALogits:
        return HotpotQALogits(
            paragraph=TwoLayerHead(2, name="paragraph")(hidden),
            sentence=TwoLayerHead(2, name="sentence")(hidden),
            answer_type=TwoLayerHead(3, name="answer_type")(hidden[:, 0]),
            span=TwoLayerHead(2, name="span")(hidden),
        )
