"""CLIP: one space for images and texts, with a tower for each (OpenAI's eight models and kin).

Symbols in comments: B texts or images, L tokens, W width of the text tower, d width of the space.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention, blocks, hooks, layers, stack
from jaxmodels.trunks.clip_resnet import ModifiedResNet, ResNetConfig
from jaxmodels.trunks.vit import Encoded, VitConfig, VitModel, check_sizes, clip_inits

_INITIAL_SCALE = math.log(1 / 0.07)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of CLIP's text tower.

    Attributes:
      vocab_size: rows of the token table.
      d_model: W, width of the residual stream.
      num_layers: transformer layers.
      num_heads: attention heads; divides d_model.
      d_ff: inner width of the feed-forward; None: 4 W.
      max_positions: longest input in tokens.
      projection_dim: d; None: no projection (Hugging Face's CLIPTextModel).
      end_id: of the token at whose first place a text is read; None: the highest id of the row,
        which is the end token in the published vocabulary.
      activation: see `layers.ACTIVATIONS`; OpenAI: "quick_gelu".
      norm_eps: of the norms.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.
      layer_hooks: what a method changes, by groups of layers (`core.hooks`).

    Raises:
      ValueError: sizes that do not fit together.
    """

    vocab_size: int = 49408
    d_model: int = 512
    num_layers: int = 12
    num_heads: int = 8
    d_ff: int | None = None
    max_positions: int = 77
    projection_dim: int | None = 512
    end_id: int | None = None
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "d_model", "num_layers", "num_heads", "max_positions")
        if self.end_id is not None and not 0 <= self.end_id < self.vocab_size:
            raise ValueError(
                f"model.end_id={self.end_id} is not in the vocabulary of {self.vocab_size}; give "
                "the end token's id, or None for the highest id of a row."
            )

    def make_layer(self, cls: type[nn.Module] = blocks.TransformerLayer, **kwargs: Any) -> Any:
        """Returns one unbound layer of these sizes, of class `cls`."""
        return cls(
            num_heads=self.num_heads,
            d_model=self.d_model,
            d_ff=self.d_ff or 4 * self.d_model,
            norm_eps=self.norm_eps,
            implementation=self.implementation,
            dtype=self.dtype,
            activation=self.activation,
            inits=clip_inits(self.d_model, self.num_layers),
            parent=None,
            **kwargs,
        )

    def make_stack(self) -> stack.Stack:
        """Returns the stack of layers with its final norm."""
        return stack.Stack(
            self.make_layer(), self.num_layers, self.layer_hooks, "layer", remat=self.remat
        )


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A text tower and an image tower whose projections are equally wide.

    Attributes:
      text: sizes of the text tower.
      vision: sizes of the image tower: a `VitConfig` (see `vision`) or a `ResNetConfig`.

    Raises:
      ValueError: the projections differ, or one is absent.
    """

    text: TextConfig
    vision: VitConfig | ResNetConfig

    def __post_init__(self) -> None:
        widths = (self.text.projection_dim, self.vision.projection_dim)
        if widths[0] is None or widths[0] != widths[1]:
            raise ValueError(
                f"projection_dim is {widths[0]} for texts and {widths[1]} for images; both "
                "towers need the same width."
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ClipConfig":
        """Returns the config of what `jaxmodels.weights` tells of a file: {"text", "vision"}."""
        vision = dict(settings["vision"])
        if "num_blocks" in vision:
            tower = ResNetConfig(**vision | {"num_blocks": tuple(vision["num_blocks"])})
        else:
            tower = VitConfig(**vision)
        return cls(TextConfig(**settings["text"]), tower)

    def with_both(self, **fields: Any) -> "ClipConfig":
        """Returns the config with fields of both towers changed: dtype, remat, ..."""
        towers = (dataclasses.replace(tower, **fields) for tower in (self.text, self.vision))
        return type(self)(*towers)

    def with_hooks(
        self,
        text_hooks: tuple[hooks.LayerHooks, ...] = (),
        image_hooks: tuple[hooks.LayerHooks, ...] = (),
    ) -> "ClipConfig":
        """Returns the config with what a method changes in the layers of either tower.

        Raises:
          ValueError: hooks for the layers of a ResNet, which has none.
        """
        text = dataclasses.replace(self.text, layer_hooks=text_hooks)
        if not image_hooks:
            return dataclasses.replace(self, text=text)
        if isinstance(self.vision, ResNetConfig):
            raise ValueError(
                "image_hooks change transformer layers, but this image tower is a ResNet; choose "
                "a ViT, or give text_hooks alone."
            )
        return type(self)(text, dataclasses.replace(self.vision, layer_hooks=image_hooks))


def vision(**sizes: Any) -> VitConfig:
    """Returns the config of CLIP's vision transformer: `VitConfig` with CLIP's kind of parts.

    Args:
      **sizes: fields of `VitConfig`.
    """
    kind = {
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
        "patch_bias": False,
        "embeddings_norm": True,
        "initialization": "clip",
    }
    return VitConfig(**kind | sizes)


def _vit(patch_size: int, image_size: int = 224) -> ClipConfig:
    sizes = {"image_size": image_size, "patch_size": patch_size}
    if patch_size == 14:
        large = sizes | {"d_model": 1024, "num_layers": 24, "num_heads": 16}
        text = TextConfig(d_model=768, num_heads=12, projection_dim=768)
        return ClipConfig(text, vision(**large, projection_dim=768))
    return ClipConfig(TextConfig(), vision(**sizes, projection_dim=512))


def _resnet(
    num_blocks: tuple[int, ...], width: int, image_size: int, text_width: int, dim: int
) -> ClipConfig:
    heads = text_width // 64
    text = TextConfig(d_model=text_width, num_heads=heads, projection_dim=dim)
    return ClipConfig(text, ResNetConfig(image_size, width, num_blocks, width // 2, dim))


# OpenAI's models, by its names in lower case.
SIZES: Mapping[str, ClipConfig] = {
    "rn50": _resnet((3, 4, 6, 3), 64, 224, 512, 1024),
    "rn101": _resnet((3, 4, 23, 3), 64, 224, 512, 512),
    "rn50x4": _resnet((4, 6, 10, 6), 80, 288, 640, 640),
    "rn50x16": _resnet((6, 8, 18, 8), 96, 384, 768, 768),
    "vit_b32": _vit(32),
    "vit_b16": _vit(16),
    "vit_l14": _vit(14),
    "vit_l14_336": _vit(14, 336),
}


class TextEmbeddings(nn.Module):
    """Token and position tables, without a norm.

    Attributes:
      config: sizes.
    """

    config: TextConfig

    def setup(self) -> None:
        config, normal = self.config, layers.normal
        self.word = layers.Embedding(config.vocab_size, config.d_model, embedding_init=normal(0.02))
        self.position = layers.Embedding(
            config.max_positions, config.d_model, (None, "embed"), normal(0.01)
        )

    def tokens(self, input_ids: jax.Array) -> jax.Array:
        """Looks tokens up, without positions: [B, L] int -> [B, L, W] float32."""
        return self.word(input_ids)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Adds positions 0 .. L-1 to [B, L, W]."""
        length = tokens.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"texts of {length} tokens, but the position table has "
                f"{self.config.max_positions} positions; shorten the texts."
            )
        return tokens + self.position.embedding[:length]


class TextTower(nn.Module):
    """Causal transformer over token ids, read at the end token.

    Nothing behind the end token matters, so rows may be cut to the longest text of a batch.

    Attributes:
      config: sizes; published checkpoints load with `jaxmodels.weights`.
    """

    config: TextConfig

    def setup(self) -> None:
        config = self.config
        self.embeddings = TextEmbeddings(config)
        self.encoder = config.make_stack()
        if config.projection_dim:
            self.projection = layers.Dense(
                config.projection_dim,
                use_bias=False,
                dtype=config.dtype,
                kernel_init=layers.normal(config.d_model**-0.5),
            )

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Looks tokens up, without positions: [B, L] int -> [B, L, W], an `inputs_embeds`."""
        return self.embeddings.tokens(input_ids)

    def encode(self, inputs_embeds: jax.Array, deterministic: bool = True) -> jax.Array:
        """Adds positions, runs layers and final norm: [B, L, W] -> the same shape, float32."""
        bias = attention.causal_bias(*(inputs_embeds.shape[1],) * 2)
        return self.encoder(self.embeddings(inputs_embeds), bias, deterministic)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        deterministic: bool = True,
        *,
        inputs_embeds: jax.Array | None = None,
    ) -> Encoded:
        """Encodes texts.

        Args:
          input_ids: [B, L] int, L at most max_positions.
          end_positions: [B] int, where each text is read; default: where input_ids has the end
            token first, see `TextConfig.end_id`.
          deterministic: no dropout in hooks; else an rng named "dropout" is needed.
          inputs_embeds: [B, L, W] in place of ids, without positions: soft prompts among `embed`
            of the words. Needs end_positions.

        Returns:
          tokens [B, L, W] after the final norm, pooled [B, W] at the end token, features [B, d].

        Raises:
          ValueError: both or none of ids and embeddings; embeddings without end_positions; too
            many tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds (tokens from `embed`).")
        if end_positions is None:
            if input_ids is None:
                raise ValueError(
                    "inputs_embeds do not tell where a text ends: give end_positions [batch], "
                    "the place of each end token."
                )
            end_positions = self.find_end(input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        tokens = self.encode(inputs_embeds, deterministic)
        # A place outside the row gives NaN, not the nearest token.
        pooled = jnp.take_along_axis(tokens, end_positions[:, None, None], axis=1)[:, 0]
        features = self.projection(pooled) if self.config.projection_dim else pooled
        return Encoded(tokens, pooled, features.astype(jnp.float32))

    def find_end(self, input_ids: jax.Array) -> jax.Array:
        """Returns the first place of the end token: [B, L] int -> [B] int32."""
        end = self.config.end_id
        return jnp.argmax(input_ids if end is None else input_ids == end, axis=1).astype(jnp.int32)


class Clip(nn.Module):
    """Both towers and the temperature of their similarities.

    Attributes:
      config: sizes; published checkpoints load with `jaxmodels.weights`.
    """

    config: ClipConfig

    def setup(self) -> None:
        self.text = TextTower(self.config.text)
        resnet = isinstance(self.config.vision, ResNetConfig)
        self.vision = (ModifiedResNet if resnet else VitModel)(self.config.vision)
        init = layers.partitioned(nn.initializers.constant(_INITIAL_SCALE), ())
        self.logit_scale = self.param("logit_scale", init, (), jnp.float32)

    def encode_text(
        self,
        input_ids: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        deterministic: bool = True,
        *,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the features of texts, [B, d] float32, not normalised; see `TextTower`."""
        given = {"inputs_embeds": inputs_embeds}
        return self.text(input_ids, end_positions, deterministic, **given).features

    def encode_image(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns the features of images [B, H, W, 3]: [B, d] float32, not normalised."""
        return self.vision(images, deterministic).features

    def logits(self, image_features: jax.Array, text_features: jax.Array) -> jax.Array:
        """Returns exp(logit_scale) cos(image, text): [B, d] x [C, d] -> [B, C] float32."""
        images, texts = normalize(image_features), normalize(text_features)
        precision = jax.lax.Precision.HIGHEST
        return jnp.exp(self.logit_scale) * jnp.matmul(images, texts.T, precision=precision)

    def __call__(
        self, images: jax.Array, input_ids: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns the similarity of every image to every text, [images, texts] float32."""
        texts = self.encode_text(input_ids, deterministic=deterministic)
        return self.logits(self.encode_image(images, deterministic), texts)


def normalize(features: jax.Array) -> jax.Array:
    """Returns features [..., d] at length 1, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
