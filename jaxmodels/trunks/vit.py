"""Vision transformers: those trained on ImageNet, and the tower that CLIP has for images.

Symbols in comments: B images, N = 1 + (H/p)(W/p) tokens of an image, the class token first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from jaxmodels.core import blocks, hooks, layers, patches, stack

INITIALIZATIONS = ("imagenet", "clip")


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes of a vision transformer.

    Attributes:
      image_size: side of the images that the position table is for, in pixels.
      patch_size: side of a patch; divides image_size.
      d_model: width of the residual stream.
      num_layers: transformer layers.
      num_heads: attention heads; divides d_model.
      d_ff: inner width of the feed-forward; None: 4 d_model.
      activation: see `layers.ACTIVATIONS`; CLIP: "quick_gelu".
      norm_eps: 1e-6 for timm's and the original weights, 1e-12 for Hugging Face's, 1e-5 for CLIP.
      patch_bias: the patch projection has a bias (not in CLIP).
      qkv_bias: the projections to queries, keys and values have biases.
      embeddings_norm: a norm before the first layer (CLIP).
      pooler: has a tanh projection of the class token (Hugging Face's pooler, `pre_logits`).
      projection_dim: width of a projection of the class token without bias (CLIP); None: none.
      interpolate_positions: images of other sizes get a resized position table; else an error.
      initialization: "imagenet" (normal 0.02; timm cuts it, but 100 deviations out) or "clip" (by
        width and depth).
      dropout_rate: hidden dropout.
      attention_dropout_rate: dropout of attention weights.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.
      layer_hooks: what a method changes, by groups of layers (`core.hooks`).

    Raises:
      ValueError: sizes that do not fit together.
    """

    image_size: int = 224
    patch_size: int = 16
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-6
    patch_bias: bool = True
    qkv_bias: bool = True
    embeddings_norm: bool = False
    pooler: bool = False
    projection_dim: int | None = None
    interpolate_positions: bool = False
    initialization: str = "imagenet"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(self, "image_size", "patch_size", "d_model", "num_layers", "num_heads")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.patch_size={self.patch_size} does not divide model.image_size="
                f"{self.image_size}; choose a divisor of the image's side."
            )
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(
                f"model.initialization={self.initialization!r}: use one of {INITIALIZATIONS}."
            )

    @property
    def num_tokens(self) -> int:
        """N: the class token and the patches of an image of `image_size`."""
        return 1 + (self.image_size // self.patch_size) ** 2

    def make_layer(self, cls: type[nn.Module] = blocks.TransformerLayer, **kwargs: Any) -> Any:
        """Returns one unbound layer of these sizes, of class `cls`."""
        inits = FrozenDict()  # the layer's own: normal 0.02
        if self.initialization == "clip":
            inits = clip_inits(self.d_model, self.num_layers)
        return cls(
            num_heads=self.num_heads,
            d_model=self.d_model,
            d_ff=self.d_ff or 4 * self.d_model,
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
            qkv_bias=self.qkv_bias,
            activation=self.activation,
            inits=inits,
            parent=None,
            **kwargs,
        )

    def make_stack(self) -> stack.Stack:
        """Returns the stack of layers with its final norm."""
        return stack.Stack(
            self.make_layer(), self.num_layers, self.layer_hooks, "layer", remat=self.remat
        )

    def make_embeddings(self, name: str | None = None) -> patches.PatchEmbeddings:
        """Returns the embedding module of these sizes."""
        inits = {}
        if self.initialization == "clip":
            normal = layers.normal(self.d_model**-0.5)
            inits = {"patch_init": CONVOLUTION_INIT, "class_init": normal, "position_init": normal}
        return patches.PatchEmbeddings(
            image_size=self.image_size,
            patch_size=self.patch_size,
            d_model=self.d_model,
            use_bias=self.patch_bias,
            interpolate_positions=self.interpolate_positions,
            dtype=self.dtype,
            name=name,
            **inits,
        )


# PyTorch's start of a convolution, uniform within fan_in^-1/2: CLIP leaves it as it is.
CONVOLUTION_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def clip_inits(d_model: int, num_layers: int) -> FrozenDict[str, layers.Initializer]:
    """Returns CLIP's initialisers of a layer's kernels: W^-1/2, less where branches add up."""
    inner = layers.normal(d_model**-0.5)
    outer = layers.normal(d_model**-0.5 * (2 * num_layers) ** -0.5)
    wide = layers.normal((2 * d_model) ** -0.5)
    attention = dict.fromkeys(("query", "key", "value"), inner)
    return FrozenDict(attention, out=outer, wi=wide, wo=outer)


def check_sizes(config: Any, *fields: str) -> None:
    """Checks that sizes are at least 1 and that the heads divide the width.

    Raises:
      ValueError: names the field.
    """
    for field in fields:
        if getattr(config, field) < 1:
            raise ValueError(f"model.{field}={getattr(config, field)}: must be at least 1.")
    if config.d_model % config.num_heads:
        raise ValueError(
            f"model.num_heads={config.num_heads} does not divide model.d_model={config.d_model}; "
            "choose a divisor of the width."
        )


_B = VitConfig()
_L = VitConfig(d_model=1024, num_layers=24, num_heads=16)
_S = VitConfig(d_model=384, num_heads=6)
# Published models; those called _384 were trained on at that size.
SIZES: Mapping[str, VitConfig] = {
    "vit_ti16": VitConfig(d_model=192, num_heads=3),
    "vit_s16": _S,
    "vit_s32": dataclasses.replace(_S, patch_size=32),
    "vit_b16": _B,
    "vit_b32": dataclasses.replace(_B, patch_size=32),
    "vit_b16_384": dataclasses.replace(_B, image_size=384),
    "vit_b32_384": dataclasses.replace(_B, image_size=384, patch_size=32),
    "vit_l16": _L,
    "vit_l32": dataclasses.replace(_L, patch_size=32),
    "vit_l16_384": dataclasses.replace(_L, image_size=384),
    "vit_l32_384": dataclasses.replace(_L, image_size=384, patch_size=32),
    "vit_h14": VitConfig(patch_size=14, d_model=1280, num_layers=32, num_heads=16),
}


@flax.struct.dataclass
class Encoded:
    """What a tower makes of an input, from the last layer outwards, all float32.

    Attributes:
      tokens: [B, N, d_model], after the final norm.
      pooled: [B, d_model], the token that stands for the whole.
      features: [B, features], `pooled` after pooler and projection, as far as there are any.
    """

    tokens: jax.Array
    pooled: jax.Array
    features: jax.Array


class VitModel(nn.Module):
    """Patches, layers and a final norm; where the config says so also pooler and projection.

    Attributes:
      config: sizes; published checkpoints load with `jaxmodels.weights`.
    """

    config: VitConfig

    def setup(self) -> None:
        config = self.config
        self.embeddings = config.make_embeddings()
        if config.embeddings_norm:
            self.embeddings_norm = layers.LayerNorm(config.norm_eps)
        self.encoder = config.make_stack()
        self.dropout = nn.Dropout(config.dropout_rate)
        if config.pooler:
            self.pooler = layers.Dense(config.d_model, dtype=config.dtype)
        if config.projection_dim:
            init = layers.normal(config.d_model**-0.5)
            self.projection = layers.Dense(
                config.projection_dim, use_bias=False, dtype=config.dtype, kernel_init=init
            )

    def embed(self, images: jax.Array) -> jax.Array:
        """Returns the tokens that `encode` reads: [B, H, W, 3] -> [B, N, d_model] float32."""
        return self.embeddings(images)

    def encode(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """Runs norm, layers and final norm: [B, N, d_model] -> the same shape, float32.

        Args:
          tokens: from `embed`; a method may add to them, or put prompts behind them.
          deterministic: no dropout; else an rng named "dropout" is needed.
        """
        tokens = self.dropout(tokens, deterministic=deterministic)
        if self.config.embeddings_norm:
            tokens = self.embeddings_norm(tokens)
        return self.encoder(tokens, deterministic=deterministic)

    def pool(self, tokens: jax.Array) -> Encoded:
        """Returns tokens, the class token and its features: [B, N, d_model] after `encode`."""
        pooled = features = tokens[:, 0]
        if self.config.pooler:
            features = jnp.tanh(self.pooler(features))
        if self.config.projection_dim:
            features = self.projection(features)
        return Encoded(tokens, pooled, features.astype(jnp.float32))

    def __call__(
        self,
        images: jax.Array | None = None,
        deterministic: bool = True,
        *,
        inputs_embeds: jax.Array | None = None,
    ) -> Encoded:
        """Encodes images.

        Args:
          images: [B, H, W, 3] float, normalised as the weights want it.
          deterministic: no dropout; else an rng named "dropout" is needed.
          inputs_embeds: [B, N, d_model] in place of images: what `embed` returns.

        Raises:
          ValueError: both or none of images and inputs_embeds; images of another size than the
            position table is for.
        """
        if (images is None) == (inputs_embeds is None):
            raise ValueError("give either images or inputs_embeds (tokens from `embed`).")
        tokens = self.embed(images) if inputs_embeds is None else inputs_embeds
        return self.pool(self.encode(tokens, deterministic))


class VitClassifier(nn.Module):
    """A vision transformer and one linear layer on its features: [B, H, W, 3] -> logits.

    Attributes:
      config: of the trunk.
      num_classes: C.
    """

    config: VitConfig
    num_classes: int

    def setup(self) -> None:
        self.trunk = VitModel(self.config)
        zeros = nn.initializers.zeros
        self.classifier = layers.Dense(
            self.num_classes, ("embed", "vocab"), dtype=self.config.dtype, kernel_init=zeros
        )

    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns logits [B, C] float32; arguments as `VitModel`."""
        features = self.trunk(images, deterministic).features
        return self.classifier(features).astype(jnp.float32)
