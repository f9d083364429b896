"""Sizes of decoder-only language models, and those of the published ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmodels.core import blocks, hooks, layers, stack
from jaxmodels.core.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder-only language model; the defaults are those of the smallest GPT-2.

    Attributes:
      vocab_size: rows of the word table.
      d_model: width of the residual stream.
      num_layers: transformer layers, with their norms in front.
      num_heads: attention heads.
      d_ff: inner width of the feed-forward.
      max_positions: longest sequence; rows of the position table where positions are learned,
        else what the model was trained for, which nothing checks.
      num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
      head_dim: width of a head; default d_model / num_heads.
      norm: "layer" (GPT-2) or "rms" (Llama).
      norm_eps: of the norms.
      activation: of the feed-forward, see `layers.ACTIVATIONS`.
      gated: feed-forward with two inner projections (Llama: SwiGLU).
      use_bias: the projections have biases (GPT-2).
      qkv_bias: those of queries, keys and values (Qwen2); default `use_bias`.
      tied_head: the word table is the head.
      rope_theta: base of rotary embeddings; None: learned positions (GPT-2).
      rope_factor: Llama 3's stretching of long wavelengths; 1: none. See `rotary.Rotary` for it
        and for the three that follow.
      rope_low_frequency_factor: of `rope_factor`.
      rope_high_frequency_factor: of `rope_factor`.
      rope_original_length: of `rope_factor`.
      dropout_rate: of embeddings and branches.
      attention_dropout_rate: of attention weights.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.
      layer_hooks: what a method changes, by groups of layers (`core.hooks`).

    Raises:
      ValueError: sizes that do not fit together, or an unknown activation.
    """

    vocab_size: int = 50257
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    max_positions: int = 1024
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    gated: bool = False
    use_bias: bool = True
    qkv_bias: bool | None = None
    tied_head: bool = True
    rope_theta: float | None = None
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1.")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; "
                "choose a divisor of the width, or set model.head_dim."
            )
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise ValueError(
                f"model.num_kv_heads={kv_heads} does not divide model.num_heads={self.num_heads}; "
                "choose a divisor."
            )
        layers.activation(self.activation)
        if self.rotary is not None:
            self.rotary.frequencies(self.head_dim or self.d_model // self.num_heads)

    @property
    def rotary(self) -> Rotary | None:
        """Rotary embeddings of these settings; None where positions are learned."""
        if self.rope_theta is None:
            return None
        return Rotary(
            self.rope_theta,
            self.rope_factor,
            self.rope_low_frequency_factor,
            self.rope_high_frequency_factor,
            self.rope_original_length,
        )

    def make_stack(self) -> stack.Stack:
        """Returns the stack of layers with its final norm."""
        # GPT-2 starts the branches' last projections smaller, so that their sum keeps its size.
        depth = 1.0 if self.rope_theta is not None else (2 * self.num_layers) ** -0.5
        small = layers.normal(0.02 * depth)
        layer = blocks.TransformerLayer(
            num_heads=self.num_heads,
            d_model=self.d_model,
            d_ff=self.d_ff,
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            qkv_bias=self.qkv_bias,
            rotary=self.rotary,
            use_bias=self.use_bias,
            norm=self.norm,
            activation=self.activation,
            gated=self.gated,
            inits=FrozenDict(out=small, wo=small),
            parent=None,
        )
        return stack.Stack(layer, self.num_layers, self.layer_hooks, self.norm, remat=self.remat)


def _gpt2(d_model: int, num_layers: int, num_heads: int) -> DecoderConfig:
    return DecoderConfig(
        d_model=d_model, num_layers=num_layers, num_heads=num_heads, d_ff=4 * d_model
    )


def _llama(d_model: int, num_layers: int, num_heads: int, d_ff: int, **more: Any) -> DecoderConfig:
    common = {
        "norm": "rms",
        "activation": "silu",
        "gated": True,
        "use_bias": False,
        "tied_head": False,
        "rope_theta": 10000.0,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    return DecoderConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        d_ff=d_ff,
        **(common | more),
    )


_LLAMA3 = {"vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 5e5}
_LONG = {"max_positions": 131072, "rope_factor": 32.0, "tied_head": True}
_QWEN2 = {"vocab_size": 151936, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 1e6}

# The published models.
SIZES: dict[str, DecoderConfig] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2_medium": _gpt2(1024, 24, 16),
    "gpt2_large": _gpt2(1280, 36, 20),
    "gpt2_xl": _gpt2(1600, 48, 25),
    "llama_7b": _llama(4096, 32, 32, 11008, vocab_size=32000, max_positions=2048, norm_eps=1e-6),
    "llama2_7b": _llama(4096, 32, 32, 11008, vocab_size=32000, max_positions=4096),
    "llama3_8b": _llama(4096, 32, 32, 14336, max_positions=8192, **_LLAMA3),
    "llama3_2_1b": _llama(2048, 16, 32, 8192, head_dim=64, **_LLAMA3, **_LONG),
    "llama3_2_3b": _llama(3072, 28, 24, 8192, head_dim=128, **_LLAMA3, **_LONG),
    "qwen2_5_0_5b": _llama(
        896, 24, 14, 4864, max_positions=32768, norm_eps=1e-6, **_QWEN2 | {"tied_head": True}
    ),
}
