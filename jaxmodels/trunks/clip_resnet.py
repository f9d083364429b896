"""CLIP's residual network for images: a stem of three convolutions, and pooling by attention.

Batch normalisation is fixed: it always uses the running statistics, which are parameters here.
They get no gradient, and `label_statistics` keeps them from optimisers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jaxmodels.core import attention, blocks, layers, partitioning, patches
from jaxmodels.core import params as param_tree
from jaxmodels.trunks.vit import CONVOLUTION_INIT, Encoded

STRIDES = (1, 2, 2, 2)
EXPANSION = 4
# Pixels a position of the last feature map.
REDUCTION = 32
_STATISTICS = ("running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a residual image tower.

    Attributes:
      image_size: side of the images that the position table is for, a multiple of 32.
      width: channels behind the stem; the last stage has 32 times as many.
      num_blocks: bottleneck blocks of each of the four stages.
      num_heads: of the attention pooling; divides 32 * width.
      projection_dim: width of the features.
      norm_eps: of the batch norms.
      interpolate_positions: images of other sizes get a resized position table; else an error.
      remat: remat policy of the blocks, see `blocks.REMAT_POLICIES`.
      dtype: of convolutions and products; batch norms are float32.

    Raises:
      ValueError: sizes that do not fit together.
    """

    image_size: int = 224
    width: int = 64
    num_blocks: tuple[int, ...] = (3, 4, 6, 3)
    num_heads: int = 32
    projection_dim: int = 1024
    norm_eps: float = 1e-5
    interpolate_positions: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.num_blocks) != len(STRIDES) or min(self.num_blocks) < 1:
            raise ValueError(
                f"model.num_blocks={self.num_blocks}: give {len(STRIDES)} numbers, each 1 or more."
            )
        for field in ("image_size", "width", "num_heads", "projection_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1.")
        if self.image_size % REDUCTION or self.width % 2:
            raise ValueError(
                f"model.image_size={self.image_size}, model.width={self.width}: the size must be "
                f"a multiple of {REDUCTION} and the width even."
            )
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide {REDUCTION} * model.width = "
                f"{self.d_model}; choose a divisor."
            )

    @property
    def d_model(self) -> int:
        """Channels of the last feature map."""
        return self.width * 8 * EXPANSION


def is_statistic(path: str) -> bool:
    """Tells whether a leaf is a running statistic of a batch norm, which is never trained."""
    return path.rpartition("/")[2] in _STATISTICS


def label_statistics(labels: Any) -> Any:
    """Returns the labels of `Task.param_groups` with "frozen" for all running statistics."""
    return param_tree.label(
        labels, lambda path, label: "frozen" if is_statistic(path) else str(label)
    )


class BatchNorm(nn.Module):
    """(x - running_mean) / sqrt(running_var + eps) * scale + bias over the last axis, float32."""

    eps: float = 1e-5
    scale_init: layers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        inits = {"scale": self.scale_init, "bias": zeros, "running_mean": zeros}

        def leaf(name: str) -> jax.Array:
            init = layers.partitioned(inits.get(name, ones), ("embed",))
            return self.param(name, init, x.shape[-1:], jnp.float32)

        mean, variance = (jax.lax.stop_gradient(leaf(name)) for name in _STATISTICS)
        factor = leaf("scale") * jax.lax.rsqrt(variance + self.eps)
        return (x.astype(jnp.float32) - mean) * factor + leaf("bias")


class ConvolutionNorm(nn.Module):
    """A convolution without bias, then a batch norm: [B, H, W, C] -> [B, H', W', features] float32.

    Attributes:
      features: channels out.
      window: side of the window; the image is padded by half of it.
      stride: of the window.
      eps: of the norm.
      dtype: of the convolution.
      scale_init: of the norm.
    """

    features: int
    window: int = 1
    stride: int = 1
    eps: float = 1e-5
    dtype: Any = jnp.float32
    scale_init: layers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.window, self.window, x.shape[-1], self.features)
        init = layers.partitioned(CONVOLUTION_INIT, (None, None, "embed", "mlp"))
        kernel = self.param("kernel", init, shape, jnp.float32)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride,) * 2,
            [(self.window // 2,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return BatchNorm(self.eps, self.scale_init, name="norm")(y)


class Bottleneck(nn.Module):
    """relu(x + conv1x1(pool(conv3x3(conv1x1(x))))), where sizes differ x -> conv1x1(pool(x)).

    The stride is an average over squares before the last convolution.

    Attributes:
      features: channels inside; outside there are `EXPANSION` times as many.
      stride: side of the squares.
      shortcut: the shortcut has a convolution.
      eps: of the norms.
      dtype: of the convolutions.
    """

    features: int
    stride: int = 1
    shortcut: bool = False
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        more = {"eps": self.eps, "dtype": self.dtype}
        wide = EXPANSION * self.features
        y = nn.relu(ConvolutionNorm(self.features, name="conv1", **more)(x))
        y = nn.relu(ConvolutionNorm(self.features, 3, name="conv2", **more)(y))
        y = average_pool(y, self.stride)
        zeros = nn.initializers.zeros  # a block starts as its shortcut alone
        y = ConvolutionNorm(wide, scale_init=zeros, name="conv3", **more)(y)
        if self.shortcut:
            x = average_pool(x, self.stride)
            x = ConvolutionNorm(wide, name="shortcut", **more)(x)
        return nn.relu(x + y)


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Returns means over squares: [B, H, W, C] -> [B, H / size, W / size, C]."""
    if size == 1:
        return x
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // size, size, width // size, size, channels)
    return squares.mean((2, 4))


class Stage(nn.Module):
    """A stage of blocks: `first`, then `rest` in a scan over its blocks stacked on a leading axis.

    Attributes:
      features: channels inside a block.
      num_blocks: blocks.
      stride: of the first block.
      config: eps, dtype and remat policy.
    """

    features: int
    num_blocks: int
    stride: int
    config: ResNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        more = {"eps": self.config.norm_eps, "dtype": self.config.dtype}
        x = Bottleneck(self.features, self.stride, True, name="first", **more)(x)
        if self.num_blocks == 1:
            return x
        block = Bottleneck(self.features, parent=None, **more)
        shape = (1, 1, 1, EXPANSION * self.features)

        def init(rng: jax.Array) -> Any:
            rngs = jax.random.split(rng, self.num_blocks - 1)
            stacked = jax.vmap(lambda key: block.init(key, jnp.zeros(shape))["params"])(rngs)
            return meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})

        def body(params: Any, x: jax.Array, key: None) -> tuple[jax.Array, None]:
            return partitioning.constrain_batch(block.apply({"params": params}, x)), None

        rest = self.param("rest", init)
        return blocks.scan_layers(body, rest, x, policy=self.config.remat)[0]


class AttentionPool(nn.Module):
    """Attention from the mean of a feature map to all of it: [B, h, w, C] -> `Encoded`.

    Attributes:
      config: sizes.
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> Encoded:
        config, (batch, height, width, d_model) = self.config, x.shape
        normal = layers.normal(d_model**-0.5)
        rows = 1 + (config.image_size // REDUCTION) ** 2
        position = layers.Embedding(rows, d_model, (None, "embed"), normal, name="position")
        tokens = x.reshape(batch, -1, d_model)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        tokens = tokens + patches.resized_positions(position.embedding, (height, width))

        def dense(name: str, features: int, axes: tuple[str, str], x: jax.Array) -> jax.Array:
            module = layers.Dense(features, axes, dtype=config.dtype, kernel_init=normal, name=name)
            return module(x)

        def heads(name: str, x: jax.Array) -> jax.Array:
            y = dense(name, d_model, ("embed", "heads"), x)
            return y.reshape(batch, -1, config.num_heads, d_model // config.num_heads)

        # Only what the first token collects is read.
        query, key, value = (
            heads(name, tokens[:, :1] if name == "query" else tokens)
            for name in ("query", "key", "value")
        )
        scale = (d_model // config.num_heads) ** -0.5
        pooled = attention.dot_product_attention(query, key, value, scale=scale)
        pooled = pooled.reshape(batch, d_model)
        features = dense("out", config.projection_dim, ("heads", "embed"), pooled)
        pooled, features = (y.astype(jnp.float32) for y in (pooled, features))
        return Encoded(tokens, pooled, features)


class ModifiedResNet(nn.Module):
    """Stem, four stages and attention pooling.

    Attributes:
      config: sizes; published checkpoints load with `jaxmodels.weights`.
    """

    config: ResNetConfig

    def setup(self) -> None:
        config = self.config
        more = {"window": 3, "eps": config.norm_eps, "dtype": config.dtype}
        half = config.width // 2
        self.stem_1 = ConvolutionNorm(half, stride=2, **more)
        self.stem_2 = ConvolutionNorm(half, **more)
        self.stem_3 = ConvolutionNorm(config.width, **more)
        self.stages = [
            Stage(config.width * 2**s, depth, stride, config, name=f"stage_{s + 1}")
            for s, (depth, stride) in enumerate(zip(config.num_blocks, STRIDES, strict=True))
        ]
        self.attention_pool = AttentionPool(config)

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        """Returns what stem and stages give: [B, H, W, 3] -> five maps [B, h, w, C] float32.

        Raises:
          ValueError: images of another size than the position table is for.
        """
        config = self.config
        patches.check_images(
            images.shape, config.image_size, REDUCTION, config.interpolate_positions
        )
        x = images
        for stem in (self.stem_1, self.stem_2, self.stem_3):
            x = nn.relu(stem(x))
        maps = [average_pool(x, 2)]
        for stage in self.stages:
            maps.append(partitioning.constrain_batch(stage(maps[-1])))
        return maps

    def __call__(self, images: jax.Array, deterministic: bool = True) -> Encoded:
        """Encodes images.

        Args:
          images: [B, H, W, 3] float, normalised as the weights want it.
          deterministic: there is no dropout here, with either value.

        Returns:
          tokens [B, 1 + h w, C]: the last map, its mean in front, with positions; pooled [B, C]
          what attention collects; features [B, projection_dim].

        Raises:
          ValueError: images of another size than the position table is for.
        """
        return self.attention_pool(self.feature_maps(images)[-1])
