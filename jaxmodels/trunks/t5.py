"""T5 encoder-decoders: v1.0 (ReLU, tied head) and v1.1 / FLAN (gated GELU, head of its own)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from jaxmodels.core import blocks, hooks, layers, stack
from jaxmodels.core.kv_cache import KVCache
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.trunks import encoder_decoder
from jaxmodels.trunks.encoder_decoder import EncoderDecoder
from jaxmodels.trunks.lm_head import LMHead, logits


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5.

    Attributes:
      vocab_size: rows of the word table (32,100 real ids in the published models).
      d_model: width of the residual stream.
      num_layers: of the encoder.
      num_decoder_layers: of the decoder.
      num_heads: H.
      head_dim: width of a head; num_heads * head_dim may differ from d_model.
      d_ff: inner width of the feed-forward.
      activation: of the feed-forward: "relu" (v1.0) or "gelu_new" (v1.1).
      gated: feed-forward with two inner projections (v1.1).
      tied_head: the word table is the head (v1.0); else a head of its own (v1.1).
      scaled_output: before a tied head the decoder's output is multiplied by d_model ** -0.5, as
        in v1.0; files of transformers 5 may have a tied head without it.
      num_buckets: of relative distances.
      max_distance: from which on all distances share a bucket.
      norm_eps: of the RMS norms.
      dropout_rate: everywhere T5 drops: embeddings, attention weights, inner feed-forward values,
        branches, and behind the final norms.
      start_id: first token of the decoder; also stands for padding in shifted labels.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.
      encoder_hooks: what a method changes in the encoder, by groups of layers (`core.hooks`).
      decoder_hooks: the same of the decoder.

    Raises:
      ValueError: a size below 1, or an unknown activation.
    """

    vocab_size: int = 32128
    d_model: int = 512
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    d_ff: int = 2048
    activation: str = "relu"
    gated: bool = False
    tied_head: bool = True
    scaled_output: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout_rate: float = 0.1
    start_id: int = 0
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32
    encoder_hooks: tuple[hooks.LayerHooks, ...] = ()
    decoder_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name != "start_id" and value < 1:
                raise ValueError(f"model.{field.name}={value}: must be at least 1.")
        layers.activation(self.activation)

    def make_layer(
        self,
        decoder: bool = False,
        cls: type[blocks.TransformerLayer] = blocks.TransformerLayer,
        **changes: Any,
    ) -> Any:
        """Returns one unbound layer, initialised as published.

        Args:
          decoder: with causal use and cross-attention.
          cls: of the layer.
          **changes: fields of the layer that differ, or that `cls` has besides.
        """
        d_model, inner = self.d_model, self.num_heads * self.head_dim
        stds = {
            "query": (d_model * self.head_dim) ** -0.5,
            "key": d_model**-0.5,
            "value": d_model**-0.5,
            "out": inner**-0.5,
            "wi": d_model**-0.5,
            "wo": self.d_ff**-0.5,
        }
        fields = {
            "norm_eps": self.norm_eps,
            "dropout_rate": self.dropout_rate,
            "attention_dropout_rate": self.dropout_rate,
            "ffn_dropout_rate": self.dropout_rate,
            "implementation": self.implementation,
            "dtype": self.dtype,
            "scale": 1.0,
            "use_bias": False,
            "norm": "rms",
            "activation": self.activation,
            "gated": self.gated,
            "cross_attention": decoder,
            "inits": FrozenDict({name: layers.normal(std) for name, std in stds.items()}),
        }
        sizes = {"num_heads": self.num_heads, "head_dim": self.head_dim, "d_ff": self.d_ff}
        return cls(d_model=d_model, parent=None, **(fields | sizes | changes))

    def make_bias(self, decoder: bool = False) -> RelativeBias:
        """Returns the unbound relative position bias that all layers of a stack share."""
        return RelativeBias(
            self.num_heads,
            self.num_buckets,
            self.max_distance,
            bidirectional=not decoder,
            embedding_init=layers.normal(self.d_model**-0.5),
            parent=None,
        )

    def make_stack(self, decoder: bool = False) -> "T5Stack":
        """Returns the encoder's or the decoder's stack."""
        return T5Stack(
            layer=self.make_layer(decoder),
            num_layers=self.num_decoder_layers if decoder else self.num_layers,
            layer_hooks=self.decoder_hooks if decoder else self.encoder_hooks,
            final_norm="rms",
            dropout_rate=self.dropout_rate,
            remat=self.remat,
            bias=self.make_bias(decoder),
        )


def _sized(d_model: int, d_ff: int, num_layers: int, num_heads: int, **more: Any) -> T5Config:
    return T5Config(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_decoder_layers=num_layers,
        num_heads=num_heads,
        **more,
    )


_V11 = {"activation": "gelu_new", "gated": True, "tied_head": False}

# The published models; unifiedqa-t5 has the sizes of t5, flan-alpaca those of flan_t5.
SIZES: dict[str, T5Config] = {
    "t5_small": _sized(512, 2048, 6, 8),
    "t5_base": _sized(768, 3072, 12, 12),
    "t5_large": _sized(1024, 4096, 24, 16),
    "t5_3b": _sized(1024, 16384, 24, 32, head_dim=128),
    "t5_11b": _sized(1024, 65536, 24, 128, head_dim=128),
    "flan_t5_small": _sized(512, 1024, 8, 6, **_V11),
    "flan_t5_base": _sized(768, 2048, 12, 12, **_V11),
    "flan_t5_large": _sized(1024, 2816, 24, 16, **_V11),
    "flan_t5_xl": _sized(2048, 5120, 24, 32, **_V11),
    "flan_t5_xxl": _sized(4096, 10240, 24, 64, **_V11),
}


class T5Stack(stack.Stack):
    """Encoder or decoder: a stack of layers that share one relative position bias.

    Attributes:
      bias: unbound; its parameters stand at `relative_bias`.
    """

    bias: RelativeBias | None = None

    def setup(self) -> None:
        super().setup()
        self.relative_bias = self.bias.clone(parent=None)

    def position_bias(self, num_queries: int, num_keys: int) -> jax.Array:
        """Returns the bias [1, H, Q, K] of positions counted from 0."""
        return self.relative_bias(num_queries, num_keys)

    def position_bias_at(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the bias [B, H, Q, K] of positions [B, Q] and [B, K]."""
        return self.relative_bias.at(query, key)


class T5(EncoderDecoder):
    """Encoder, decoder and head.

    Parameters: `shared` (word table), `encoder` and `decoder` (`layers`, `relative_bias`,
    `final_norm`, hooks) and, untied, `lm_head`.

    Attributes:
      config: sizes; a Hugging Face checkpoint loads with `jaxmodels.weights`.
    """

    config: T5Config

    def setup(self) -> None:
        config = self.config
        normal = layers.normal(1.0)
        self.shared = layers.Embedding(config.vocab_size, config.d_model, embedding_init=normal)
        self.encoder = self.make_encoder()
        self.decoder = config.make_stack(decoder=True)
        if not config.tied_head:
            self.lm_head = LMHead(config.d_model, config.vocab_size, normal)
        self.dropout = nn.Dropout(config.dropout_rate)

    def make_encoder(self) -> nn.Module:
        """Returns the encoder; a method with another one derives a class."""
        return self.config.make_stack()

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the word embeddings of ids [B, L] int -> [B, L, d_model] float32."""
        return self.shared(ids)

    def enter(
        self, side: str, x: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the word embeddings x [B, L, d_model] as a stack reads them, and position bias.

        Args:
          side: "encoder" or "decoder".
          x: a whole sequence.
          deterministic: no dropout.
        """
        bias = getattr(self, side).position_bias(x.shape[1], x.shape[1])
        return self.dropout(x, deterministic=deterministic), bias

    def head_kernel(self) -> jax.Array:
        """Returns the head's kernel [d_model, vocab_size], tied or not."""
        return self.shared.embedding.T if self.config.tied_head else self.lm_head.kernel

    def project(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns the logits [..., vocab_size] float32 that `kernel` makes of decoder outputs."""
        config = self.config
        if config.tied_head and config.scaled_output:
            hidden = hidden * config.d_model**-0.5
        return logits(hidden, kernel, config.dtype)

    def place(self, x: jax.Array, cache: KVCache) -> tuple[jax.Array, jax.Array]:
        """Returns the word embeddings [N, 1, d_model] of the next place, and its position bias."""
        places = jnp.arange(cache.max_length)[None]
        return x, self.decoder.position_bias_at(cache.length[None, None], places)


def shift_right(labels: jax.Array, start_id: int = 0, pad_id: int = 0) -> jax.Array:
    """Returns decoder inputs [B, T] of labels [B, T]: start token in front, -100 as padding."""
    return encoder_decoder.shift_right(labels, start_id, pad_id)
