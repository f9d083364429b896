"""A BERT-type encoder whose every second layer is a mixture of experts, with a tied output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention, blocks, layers, partitioning
from jaxmodels.smile import moe
from jaxmodels.smile.layer import MoeMlp
from jaxmodels.smile.settings import MoeConfig
from jaxmodels.trunks import bert


class MoeLayer(blocks.TransformerLayer):
    """A transformer layer with experts for its feed-forward; padding is not routed.

    Attributes:
      experts: of the layer.
    """

    experts: MoeConfig | None = None

    def setup(self) -> None:
        super().setup()  # its feed-forward is never called, so it has no parameters
        self.moe = MoeMlp(self.experts)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        deterministic: bool = True,
        *,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, moe.Report]:
        """Runs one layer: [B, L, d_model] -> the same shape, and the experts' report.

        Args:
          x: the residual stream.
          bias: broadcastable to [B, H, L, L].
          deterministic: no dropout, no jitter, the evaluation's capacities.
          mask: [B, L], 1 on real tokens.
        """
        reports = []

        def attend(x: jax.Array) -> jax.Array:
            return self.attention(x, bias, None, deterministic)

        def feed_forward(x: jax.Array) -> jax.Array:
            y, report = self.moe(x, mask, deterministic)
            reports.append(report)
            return y

        x = self.branch("attention", attend, x, deterministic)
        return self.branch("ffn", feed_forward, x, deterministic), reports[0]


@dataclasses.dataclass(frozen=True)
class SmileConfig:
    """An encoder of dense layers, or of pairs of a dense and an MoE layer.

    Attributes:
      trunk: sizes; `d_ff` is that of the dense layers.
      experts: of the MoE layers; None: all layers are dense.

    Raises:
      ValueError: an odd number of layers with experts.
    """

    trunk: bert.BertConfig
    experts: MoeConfig | None = None

    def __post_init__(self) -> None:
        if self.experts is not None and self.trunk.num_layers % 2:
            raise ValueError(
                f"model.num_layers={self.trunk.num_layers}: every second layer has experts, so "
                "the number must be even."
            )


class SmileBert(nn.Module):
    """Embeddings, encoder and masked-language-model head.

    Parameters: `embeddings`; `dense_layers` and `moe_layers`, stacked over the pairs (or
    `encoder/layers` where all are dense); `final_norm` where norms are in front; `head`. The word
    table is the output matrix as well.

    Attributes:
      config: sizes.
    """

    config: SmileConfig

    def setup(self) -> None:
        trunk, pairs = self.config.trunk, self.config.trunk.num_layers // 2
        self.embeddings = trunk.make_embeddings("embeddings")
        self.head = MLMTransform(trunk.vocab_size, trunk.norm_eps, trunk.dtype)
        if self.config.experts is None:
            self.encoder = trunk.make_stack()
            return
        if trunk.norm_order == "pre":
            self.final_norm = layers.LayerNorm(trunk.norm_eps)
        self.layers = (
            trunk.make_layer(),
            trunk.make_layer(MoeLayer, experts=self.config.experts),
        )
        self.stacks = tuple(
            self.param(name, blocks.stacked_init(layer, pairs, trunk.d_model))
            for name, layer in zip(("dense_layers", "moe_layers"), self.layers, strict=True)
        )

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, moe.Report | None]:
        """Encodes ids.

        Args:
          input_ids: [batch, length] int.
          attention_mask: [batch, length], 1 on real tokens.
          deterministic: no dropout, no jitter; else an rng named "dropout" is needed.

        Returns:
          [batch, length, d_model] float32.
          the reports of the MoE layers, stacked; None without experts.

        Raises:
          ValueError: the input is longer than the position table.
        """
        length = input_ids.shape[1]
        bert.check_length(length, self.config.trunk.max_positions)
        positions = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
        x = self.embeddings(input_ids, positions, None, deterministic)
        if self.is_initializing():
            self.logits(x)
        bias = attention.key_mask_bias(attention_mask)[:, None, None, :]
        if self.config.experts is None:
            return self.encoder(x, bias, deterministic), None
        dense, sparse = self.layers

        def body(params: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
            rngs = (None, None)
            if key is not None:
                rngs = tuple({"dropout": own} for own in jax.random.split(key))
            still = key is None
            x = dense.apply({"params": params[0]}, x, bias, still, rngs=rngs[0])
            x, report = sparse.apply(
                {"params": params[1]},
                *(partitioning.constrain_batch(x), bias, still),
                mask=attention_mask,
                rngs=rngs[1],
            )
            return partitioning.constrain_batch(x), report

        rng = None if deterministic else self.make_rng("dropout")
        x, reports = blocks.scan_layers(body, self.stacks, x, rng, self.config.trunk.remat)
        return self.final_norm(x) if self.config.trunk.norm_order == "pre" else x, reports

    def logits(self, states: jax.Array) -> jax.Array:
        """Returns logits over the vocabulary: [..., d_model] -> [..., vocab_size] float32."""
        return self.head(states, self.embeddings.word.embedding)


class MLMTransform(nn.Module):
    """norm(gelu(dense(x))) E^T + b with the word table E: [..., d] -> [..., vocab_size] float32.

    Attributes:
      vocab_size: rows of the table.
      norm_eps: of the layer norm.
      dtype: of the matrix products.
    """

    vocab_size: int
    norm_eps: float = 1e-12
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        x = layers.Dense(x.shape[-1], ("embed", "mlp"), dtype=self.dtype, name="dense")(x)
        x = nn.gelu(x, approximate=False)
        x = layers.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        init = layers.partitioned(nn.initializers.zeros, ("vocab",))
        bias = self.param("bias", init, (self.vocab_size,), jnp.float32)
        return layers.product(x, table.T.astype(self.dtype)) + bias
