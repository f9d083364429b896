"""How an image becomes tokens: patches, a class token and learned positions on a grid."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.core import layers

# Keys' cubic convolution with the slope that PyTorch's bicubic resizing has (jax.image: -0.5).
_CUBIC_SLOPE = -0.75


class PatchProjection(nn.Module):
    """A convolution whose stride is its window: [B, H, W, C] -> [B, H/p, W/p, features].

    Attributes:
      features: width of the tokens.
      patch_size: p.
      use_bias: adds a bias.
      dtype: of the product (parameters stay float32); float32 accumulation.
      kernel_init: initialiser of the kernel [p, p, C, features].
    """

    features: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: layers.Initializer = layers.normal(0.02)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, (batch, height, width, channels) = self.patch_size, images.shape
        shape = (size, size, channels, self.features)
        init = layers.partitioned(self.kernel_init, (None, None, None, "embed"))
        kernel = self.param("kernel", init, shape, jnp.float32)
        # Windows do not overlap: a product of matrices, on units that are made for it.
        x = images.reshape(batch, height // size, size, width // size, size, channels)
        x = x.swapaxes(2, 3).reshape(batch, height // size, width // size, -1)
        y = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.reshape(-1, self.features).astype(self.dtype),
            (((3,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if self.use_bias:
            zeros = layers.partitioned(nn.initializers.zeros, ("embed",))
            y = y + self.param("bias", zeros, (self.features,), jnp.float32)
        return y


class PatchEmbeddings(nn.Module):
    """[class token, patches row by row] + positions: [B, H, W, 3] -> [B, 1 + patches, d_model].

    Attributes:
      image_size: side of the images that the position table is for, in pixels.
      patch_size: side of a patch; divides image_size.
      d_model: width of the tokens.
      use_bias: of the patch projection.
      interpolate_positions: images of other sizes get a resized position table; else an error.
      dtype: of the patch projection.
      patch_init, class_init, position_init: initialisers.
    """

    image_size: int
    patch_size: int
    d_model: int
    use_bias: bool = True
    interpolate_positions: bool = False
    dtype: Any = jnp.float32
    patch_init: layers.Initializer = layers.normal(0.02)
    class_init: layers.Initializer = layers.normal(0.02)
    position_init: layers.Initializer = layers.normal(0.02)

    def setup(self) -> None:
        self.grid = self.image_size // self.patch_size
        self.patch = PatchProjection(
            self.d_model, self.patch_size, self.use_bias, self.dtype, self.patch_init
        )
        init = layers.partitioned(self.class_init, ("embed",))
        self.class_token = self.param("class_token", init, (self.d_model,), jnp.float32)
        rows = 1 + self.grid**2
        axes = (None, "embed")
        self.position = layers.Embedding(rows, self.d_model, axes, self.position_init)

    def patches(self, images: jax.Array) -> jax.Array:
        """Projects patches without positions: [B, H, W, 3] -> [B, H/p, W/p, d_model] float32.

        Raises:
          ValueError: the images have another shape than the positions are for.
        """
        check_images(images.shape, self.image_size, self.patch_size, self.interpolate_positions)
        return self.patch(images)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds images [B, H, W, 3] -> [B, 1 + patches, d_model] float32; see `patches`."""
        x = self.patches(images)
        batch, *grid, d_model = x.shape
        first = jnp.broadcast_to(self.class_token, (batch, 1, d_model))
        x = jnp.concatenate([first, x.reshape(batch, -1, d_model)], axis=1)
        return x + resized_positions(self.position.embedding, tuple(grid))


def check_images(
    shape: tuple[int, ...], image_size: int, stride: int, any_size: bool = False
) -> None:
    """Checks the shape of a batch of images against what a model's position table is for.

    Args:
      shape: of the images; [B, H, W, 3] is right.
      image_size: side that the table is for.
      stride: pixels a position, which divide the sides.
      any_size: other sides are right as well.

    Raises:
      ValueError: says what was given, what is accepted and how to get there.
    """
    if len(shape) != 4 or shape[3] != 3:
        hint = " (channels stand last)" if len(shape) == 4 and shape[1] == 3 else ""
        raise ValueError(f"images of shape {shape}: give [batch, height, width, 3]{hint}.")
    height, width = shape[1:3]
    if not any_size and (height, width) != (image_size, image_size):
        raise ValueError(
            f"images of {height} x {width} pixels, but the positions are for {image_size} x "
            f"{image_size}: resize the images, or set interpolate_positions=True."
        )
    if height % stride or width % stride or not height * width:
        raise ValueError(
            f"images of {height} x {width} pixels do not divide into patches of {stride} x "
            f"{stride}: resize or crop them to multiples of {stride}."
        )


def resized_positions(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Returns a position table for another grid, by bicubic interpolation as in PyTorch.

    Args:
      table: [1 + n * n, d]; its first row, the class token's, stays as it is.
      grid: wanted rows and columns; (n, n) returns `table` itself.

    Returns:
      [1 + rows * columns, d].
    """
    side = math.isqrt(table.shape[0] - 1)
    if grid == (side, side):
        return table
    squares = table[1:].reshape(side, side, -1)
    down, across = (cubic_weights(side, length) for length in grid)
    # Two small products at full precision, as the original computes it in float32.
    precision = jax.lax.Precision.HIGHEST
    squares = jnp.einsum("ri,cj,ijd->rcd", down, across, squares, precision=precision)
    return jnp.concatenate([table[:1], squares.reshape(-1, table.shape[1])])


def cubic_weights(source: int, target: int) -> np.ndarray:
    """Returns [target, source] float32: what each of `source` samples adds to each new one.

    Cubic convolution between pixel centres, the ends repeated beyond the edges, without smoothing
    where there are fewer new samples.
    """
    a = _CUBIC_SLOPE
    weights = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        first = math.floor(centre)
        for at in range(first - 1, first + 3):
            x = abs(centre - at)
            if x <= 1:
                weight = ((a + 2) * x - (a + 3)) * x * x + 1
            else:
                weight = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            weights[row, min(max(at, 0), source - 1)] += weight
    return weights.astype(np.float32)
