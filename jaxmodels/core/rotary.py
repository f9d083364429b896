"""Rotary position embeddings: queries and keys turned by angles that grow with the position."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Frequencies of rotary embeddings, with Llama 3's stretching of long wavelengths.

    Attributes:
      theta: base of the geometric series of wavelengths.
      factor: wavelengths beyond `original_length` are this many times longer; 1: no stretching.
      low_frequency_factor: wavelengths above original_length / this are stretched whole.
      high_frequency_factor: wavelengths below original_length / this stay as they are.
      original_length: positions that the model was first trained on.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, width: int) -> np.ndarray:
        """Returns radians a position, [width / 2] float32, of heads of `width` values.

        Raises:
          ValueError: an odd width.
        """
        if width % 2:
            raise ValueError(f"head width {width}: rotary embeddings need an even one.")
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        plain = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.factor == 1.0:
            return plain
        wavelength = 2 * math.pi / plain
        low = self.original_length / self.low_frequency_factor
        high = self.original_length / self.high_frequency_factor
        share = (self.original_length / wavelength - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        between = (1 - share) * plain / self.factor + share * plain
        found = np.where(wavelength > low, plain / self.factor, between)
        return np.where(wavelength < high, plain, found).astype(np.float32)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Turns pairs (i, i + width/2) of each head: x [B, L, H, D], positions [B or 1, L] int."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(x.shape[-1])
        cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.astype(x.dtype)
