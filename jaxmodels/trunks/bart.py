"""BART encoder-decoders, post-norm as published; and mBART's, pre-norm."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import blocks, hooks, layers, stack
from jaxmodels.core.kv_cache import KVCache
from jaxmodels.trunks import encoder_decoder
from jaxmodels.trunks.encoder_decoder import EncoderDecoder
from jaxmodels.trunks.lm_head import logits

POSITION_OFFSET = 2  # rows at the top of the position tables that are no positions


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """Sizes of a BART; the defaults are those of BART-base.

    Attributes:
      vocab_size: rows of the word table.
      d_model: width of the residual stream.
      num_layers: of the encoder.
      num_decoder_layers: of the decoder.
      num_heads: attention heads; divides d_model.
      d_ff: inner width of the feed-forward.
      max_positions: longest input and output; the position tables have 2 rows more.
      norm_order: "post" (BART) or "pre" (mBART: norms in front, and a final norm a stack).
      norm_eps: of the layer norms.
      activation: of the feed-forward, see `layers.ACTIVATIONS`.
      scale_embedding: word embeddings are multiplied by sqrt(d_model) (mBART); not in the head.
      logits_bias: a bias is added to the logits; published files hold zeros there.
      start_id: first token of the decoder.
      pad_id: stands for padding in shifted labels.
      dropout_rate: of embeddings and branches.
      attention_dropout_rate: of attention weights.
      ffn_dropout_rate: of the inner values of the feed-forward.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.
      encoder_hooks: what a method changes in the encoder, by groups of layers (`core.hooks`).
      decoder_hooks: the same of the decoder.

    Raises:
      ValueError: sizes that do not fit together, an unknown norm order or activation.
    """

    vocab_size: int = 50265
    d_model: int = 768
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 12
    d_ff: int = 3072
    max_positions: int = 1024
    norm_order: str = "post"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    scale_embedding: bool = False
    logits_bias: bool = False
    start_id: int = 2
    pad_id: int = 1
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    ffn_dropout_rate: float = 0.1
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32
    encoder_hooks: tuple[hooks.LayerHooks, ...] = ()
    decoder_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "num_layers", "num_decoder_layers", "num_heads", "d_ff")
        for field in (*sizes, "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1.")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; "
                "choose a divisor of the width."
            )
        if self.norm_order not in ("pre", "post"):
            raise ValueError(f"model.norm_order={self.norm_order!r}: use 'post' or 'pre'.")
        layers.activation(self.activation)

    def make_stack(self, decoder: bool = False) -> stack.Stack:
        """Returns the encoder's stack of layers, or the decoder's."""
        layer = blocks.TransformerLayer(
            num_heads=self.num_heads,
            d_model=self.d_model,
            d_ff=self.d_ff,
            norm_order=self.norm_order,
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            ffn_dropout_rate=self.ffn_dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
            activation=self.activation,
            cross_attention=decoder,
            parent=None,
        )
        return stack.Stack(
            layer,
            self.num_decoder_layers if decoder else self.num_layers,
            self.decoder_hooks if decoder else self.encoder_hooks,
            final_norm="layer" if self.norm_order == "pre" else "",
            remat=self.remat,
        )


def _large(**more: Any) -> BartConfig:
    return BartConfig(
        d_model=1024, num_layers=12, num_decoder_layers=12, num_heads=16, d_ff=4096, **more
    )


# The published models; fine-tuned ones have these sizes, some a few rows of vocabulary more.
SIZES: dict[str, BartConfig] = {
    "bart_base": BartConfig(),
    "bart_large": _large(),
    "mbart_large": _large(vocab_size=250027, norm_order="pre", scale_embedding=True),
}


class BartEmbeddings(nn.Module):
    """norm(word embeddings + position[index + 2]), then dropout.

    Attributes:
      config: sizes.
    """

    config: BartConfig

    def setup(self) -> None:
        config = self.config
        rows = config.max_positions + POSITION_OFFSET
        self.position = layers.Embedding(rows, config.d_model, (None, "embed"))
        self.norm = layers.LayerNorm(config.norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)

    def __call__(
        self, x: jax.Array, start: jax.Array | int = 0, deterministic: bool = True
    ) -> jax.Array:
        """Returns the residual stream of word embeddings `x` [B, L, d_model] from place `start`."""
        positions = POSITION_OFFSET + start + jnp.arange(x.shape[1])
        x = self.norm(x + self.position(positions))
        return self.dropout(x, deterministic=deterministic)


class BartModel(EncoderDecoder):
    """Encoder, decoder and head, which is the word table.

    Parameters: `shared` (word table), `encoder_embeddings` and `decoder_embeddings` (`position`,
    `norm`), `encoder` and `decoder` (`layers`, hooks, and pre-norm `final_norm`) and, where there
    is one, `final_logits_bias`.

    Attributes:
      config: sizes; a Hugging Face checkpoint loads with `jaxmodels.weights`.
    """

    config: BartConfig

    def setup(self) -> None:
        config = self.config
        self.shared = layers.Embedding(config.vocab_size, config.d_model)
        self.encoder_embeddings = BartEmbeddings(config)
        self.decoder_embeddings = BartEmbeddings(config)
        self.encoder = config.make_stack()
        self.decoder = config.make_stack(decoder=True)
        if config.logits_bias:
            init = layers.partitioned(nn.initializers.zeros, ("vocab",))
            self.final_logits_bias = self.param(
                "final_logits_bias", init, (config.vocab_size,), jnp.float32
            )

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the word embeddings of ids [B, L] int -> [B, L, d_model] float32, scaled."""
        x = self.shared(ids)
        return x * self.config.d_model**0.5 if self.config.scale_embedding else x

    def enter(self, side: str, x: jax.Array, deterministic: bool = True) -> tuple[jax.Array, None]:
        """Returns the residual stream of word embeddings x [B, L, d_model]; no position bias.

        Args:
          side: "encoder" or "decoder".
          x: a whole sequence.
          deterministic: no dropout.
        """
        return getattr(self, f"{side}_embeddings")(x, deterministic=deterministic), None

    def head_kernel(self) -> jax.Array:
        """Returns the word table as the head's kernel [d_model, vocab_size]."""
        return self.shared.embedding.T

    def project(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns the logits [..., vocab_size] float32 that `kernel` makes of decoder outputs."""
        found = logits(hidden, kernel, self.config.dtype)
        return found + self.final_logits_bias if self.config.logits_bias else found

    def place(self, x: jax.Array, cache: KVCache) -> tuple[jax.Array, None]:
        """Returns the residual stream [N, 1, d_model] of the next place; no position bias."""
        return self.decoder_embeddings(x, cache.length), None

    def check_length(self, what: str, length: int) -> None:
        """Raises ValueError where an "input" or "output" is longer than the position table."""
        most = self.config.max_positions
        if length > most:
            raise ValueError(
                f"{what} of {length} tokens, but the position table has {most} positions; shorten "
                "it, or grow the table with core.embeddings.grow_position_table."
            )


def shift_right(labels: jax.Array, start_id: int = 2, pad_id: int = 1) -> jax.Array:
    """Returns decoder inputs [B, T] of labels [B, T]: start token in front, -100 as padding.

    mBART wants the language token there that ends the labels: give decoder inputs of your own.
    """
    return encoder_decoder.shift_right(labels, start_id, pad_id)
