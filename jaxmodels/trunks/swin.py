"""Swin Transformers for images: sizes, the trunk and a classifier on it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.core import hooks, layers, patches
from jaxmodels.trunks import swin_layers


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin.

    Attributes:
      d_model: width of the first stage; every further stage doubles it.
      depths: layers of each stage; the odd ones (1, 3, ...) of a stage are shifted.
      num_heads: attention heads of each stage.
      windows: side of a window of each stage, in tokens: the size of its table of position biases.
        Where an image leaves fewer tokens on a side, the window is that side and nothing shifts.
      patch_size: side of a patch in pixels.
      num_channels: of an image.
      mlp_ratio: inner width of the feed-forward by that of the stage.
      qkv_bias: queries, keys and values have biases.
      activation: of the feed-forward.
      norm_eps: of all norms.
      dropout_rate: behind the patches, on branches and on inner feed-forward values.
      attention_dropout_rate: dropout of attention weights.
      drop_path_rate: share of branches that the last layer drops, image by image; the first
        drops none, between them it grows evenly.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`; windows are short, so "xla".
      dtype: of the matrix products.
      layer_hooks: what a method changes (`core.hooks`); layers are counted through all stages,
        and step=2 takes the shifted or the others alone.

    Raises:
      ValueError: sizes that do not fit together.
    """

    d_model: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    windows: tuple[int, ...] = (7, 7, 7, 7)
    patch_size: int = 4
    num_channels: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: str = "none"
    implementation: str | None = "xla"
    dtype: Any = jnp.float32
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        stages = {len(self.depths), len(self.num_heads), len(self.windows)}
        if len(stages) > 1 or 0 in stages:
            raise ValueError(
                f"model.depths={self.depths}, model.num_heads={self.num_heads} and "
                f"model.windows={self.windows} need one entry a stage each."
            )
        for field in ("d_model", "patch_size", "num_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1.")
        if min(*self.depths, *self.num_heads, *self.windows) < 1:
            raise ValueError("model.depths, num_heads and windows: every entry at least 1.")
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(
                    f"model.num_heads={self.num_heads}: {heads} does not divide the width "
                    f"{self.width(stage)} of stage {stage}; choose a divisor."
                )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"model.drop_path_rate={self.drop_path_rate}: choose 0 <= rate < 1.")
        layers.activation(self.activation)
        hooks.owners(self.layer_hooks, sum(self.depths))

    def width(self, stage: int) -> int:
        """Width of the residual stream of a stage."""
        return self.d_model * 2**stage

    def make_layer(self, stage: int) -> swin_layers.SwinLayer:
        """Returns one unbound layer of a stage."""
        width = self.width(stage)
        return swin_layers.SwinLayer(
            num_heads=self.num_heads[stage],
            d_model=width,
            d_ff=int(self.mlp_ratio * width),
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            ffn_dropout_rate=self.dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
            qkv_bias=self.qkv_bias,
            activation=self.activation,
            window=self.windows[stage],
            parent=None,
        )

    def make_stage(self, stage: int) -> swin_layers.SwinStage:
        """Returns a stage; all but the last end in a merging of patches."""
        start = sum(self.depths[:stage])
        rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
        part = slice(start, start + self.depths[stage])
        return swin_layers.SwinStage(
            layer=self.make_layer(stage),
            owners=tuple(hooks.owners(self.layer_hooks, sum(self.depths))[part]),
            layer_hooks=self.layer_hooks,
            drop_path_rates=tuple(rates[part].tolist()) if self.drop_path_rate else (),
            merge=stage + 1 < len(self.depths),
            remat=self.remat,
        )


def _published(**sizes: Any) -> SwinConfig:
    deep = {"depths": (2, 2, 18, 2)}
    return SwinConfig(**(deep | sizes))


SIZES: dict[str, SwinConfig] = {
    "swin_tiny": SwinConfig(drop_path_rate=0.2),
    "swin_small": _published(drop_path_rate=0.3),
    "swin_base": _published(d_model=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "swin_base_384": _published(
        d_model=128, num_heads=(4, 8, 16, 32), windows=(12,) * 4, drop_path_rate=0.5
    ),
    "swin_large": _published(d_model=192, num_heads=(6, 12, 24, 48), drop_path_rate=0.2),
    "swin_large_384": _published(
        d_model=192, num_heads=(6, 12, 24, 48), windows=(12,) * 4, drop_path_rate=0.2
    ),
}


class SwinEmbeddings(nn.Module):
    """Norm of a projection of each patch: [B, H, W, C] -> [B, h, w, d_model] float32.

    A side that patches do not divide gets zeros below or to the right.

    Attributes:
      patch_size: side of a patch in pixels.
      d_model: width of a token.
      norm_eps: of the layer norm.
      dtype: of the matrix product.
    """

    patch_size: int
    d_model: int
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self) -> None:
        # PyTorch's start of a convolution, which the published training kept.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.patch = patches.PatchProjection(
            self.d_model, self.patch_size, dtype=self.dtype, kernel_init=init
        )
        self.norm = layers.LayerNorm(self.norm_eps)

    def __call__(self, images: jax.Array) -> jax.Array:
        down, right = (-side % self.patch_size for side in images.shape[1:3])
        return self.norm(self.patch(jnp.pad(images, ((0, 0), (0, down), (0, right), (0, 0)))))


class SwinModel(nn.Module):
    """Patches, stages and final norm of a Swin.

    A method with another stem calls `encode` with tokens of its own: no parameters are made for
    the parts that are not called.

    Attributes:
      config: sizes; official and Hugging Face checkpoints load with `jaxmodels.weights`.
    """

    config: SwinConfig

    def setup(self) -> None:
        config = self.config
        self.embeddings = SwinEmbeddings(
            config.patch_size, config.d_model, config.norm_eps, config.dtype
        )
        self.stages = [config.make_stage(stage) for stage in range(len(config.depths))]
        self.final_norm = layers.LayerNorm(config.norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)

    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Encodes images.

        Args:
          images: [batch, height, width, channels] float, normalised as the weights want it.
          deterministic: nothing is dropped; else an rng named "dropout" is needed.

        Returns:
          [batch, rows, columns, width] float32: a token for each 32 x 32 pixels, as published.

        Raises:
          ValueError: not such images.
        """
        return self.encode(self.embed(images), deterministic)

    def embed(self, images: jax.Array) -> jax.Array:
        """Returns the tokens of images [batch, height, width, channels]: [batch, h, w, d_model].

        Raises:
          ValueError: integers, or not channels-last.
        """
        channels = self.config.num_channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(
                f"images of shape {images.shape}: use [batch, height, width, {channels}], "
                "channels last."
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images of {images.dtype}: scale and normalise them to float first.")
        return self.embeddings(images)

    def encode(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """Runs the stages and the final norm over tokens [batch, h, w, d_model]."""
        x = self.dropout(tokens, deterministic=deterministic)
        for stage in self.stages:
            x = stage(x, deterministic)
        return self.final_norm(x)


class SwinClassifier(nn.Module):
    """A linear head on the mean of the tokens: [B, H, W, C] -> [B, num_classes] float32 logits.

    Attributes:
      config: of the trunk.
      num_classes: of the logits.
    """

    config: SwinConfig
    num_classes: int

    def setup(self) -> None:
        self.trunk = SwinModel(self.config)
        axes = ("embed", "vocab")
        self.classifier = layers.Dense(self.num_classes, axes, dtype=self.config.dtype)

    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """See `SwinModel`."""
        tokens = self.trunk(images, deterministic)
        return self.classifier(tokens.mean((1, 2))).astype(jnp.float32)
