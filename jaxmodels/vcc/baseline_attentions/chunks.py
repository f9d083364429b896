"""Exact attention to few keys a query: by chunks of queries, never over n x n scores.

Axes: B batch, S chunks, c queries a chunk, H heads, D head width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.core import attention
from jaxmodels.core.relative_bias import RelativeBias

Drop = Callable[[jax.Array], jax.Array]


@struct.dataclass
class Keys:
    """Some of the keys that chunks of queries read.

    Attributes:
      key, value: [B, K, H, D] where all chunks read them, [B, S, K, H, D] where each has its own.
      bias: broadcastable to [B, S, H, c, K] float32; None for none.
    """

    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None

    @property
    def axes(self) -> str:
        """The letters of the axes of `key`."""
        return "bkhd" if self.key.ndim == 4 else "bskhd"


def attend(query: jax.Array, parts: Sequence[Keys], drop: Drop | None = None) -> jax.Array:
    """One softmax over the keys of all parts: scaled queries [B, S, c, H, D] -> the same shape.

    Scores, softmax and sums are float32. A key that stands in two parts counts twice.
    """
    scores = []
    for part in parts:
        found = jnp.einsum(
            f"bsqhd,{part.axes}->bshqk", query, part.key, preferred_element_type=jnp.float32
        )
        scores.append(found if part.bias is None else found + part.bias)
    top = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in scores))
    weights = [jnp.exp(x - jax.lax.stop_gradient(top)) for x in scores]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    mixed = jnp.zeros((), jnp.float32)
    for part, weight in zip(parts, weights, strict=True):
        weight = weight / total
        weight = weight if drop is None else drop(weight)
        mixed = mixed + jnp.einsum(
            f"bshqk,{part.axes}->bsqhd",
            weight.astype(part.value.dtype),
            part.value,
            preferred_element_type=jnp.float32,
        )
    return mixed.astype(query.dtype)


def over_chunks(step: Callable[[Any], jax.Array], xs: Any, chunk: int, whole: bool) -> jax.Array:
    """Runs `step` on some chunks at a time, weights recomputed in the backward pass.

    Args:
      step: a tree like `xs` with fewer chunks -> [B, S, c, ...].
      xs: leaves [B or 1, S, ...]; what a step does with zeros (False) must be finite.
      chunk: c; the rows of a step are those of core attention (`attention.chunking`).
      whole: all at once, for steps that drop weights at random.
    """
    start, rows = attention.chunking()
    count, size = jax.tree.leaves(xs)[0].shape[1], max(1, rows // chunk)
    if whole or count * chunk < start or size >= count:
        return step(xs)
    tail = -count % size

    def grouped(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], (count + tail) // size, size, *x.shape[2:]), 1, 0)

    body = jax.checkpoint(step, prevent_cse=False)
    _, out = jax.lax.scan(lambda _, x: (None, body(x)), None, jax.tree.map(grouped, xs))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :count]


def cut(x: jax.Array, chunk: int) -> jax.Array:
    """Cuts [B, n, ...] into chunks [B, S, c, ...]; zeros fill the last one."""
    tail = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def with_neighbours(x: jax.Array, chunk: int) -> jax.Array:
    """Chunks of [B, n, ...] with the chunks before and behind: [B, S, 3 c, ...], zeros outside."""
    x = cut(x, chunk)
    count = x.shape[1]
    x = jnp.pad(x, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2))
    return jnp.concatenate([x[:, i : i + count] for i in range(3)], axis=2)


def join(chunks: jax.Array, length: int) -> jax.Array:
    """Undoes `cut`: [B, S, c, ...] -> [B, length, ...]."""
    return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])[:, :length]


def hidden(keep: jax.Array) -> jax.Array:
    """Returns 0 where `keep` is True and as good as minus infinity elsewhere, float32."""
    return jnp.where(keep, 0.0, attention.HIDDEN).astype(jnp.float32)


def band_distances(chunk: int) -> np.ndarray:
    """Distances key - query [c, 3 c] between a chunk and itself with its neighbours."""
    return np.arange(-chunk, 2 * chunk)[None, :] - np.arange(chunk)[:, None]


def band_bias(chunk: int, radius: int, values: jax.Array | None) -> jax.Array:
    """Returns [H or 1, c, 3 c]: position bias up to `radius` tokens away, hidden beyond."""
    distance = band_distances(chunk)
    bias = hidden(np.abs(distance) <= radius)[None]
    return bias if values is None else bias + at_distance(values, distance)


def distance_values(bias: RelativeBias) -> jax.Array:
    """Returns the bias of every distance key - query up to where it stays the same: [H, 2 far + 1].

    What a method needs of a relative position bias, as an array that loops may close over.
    """
    far = bias.max_distance
    return bias.embedding[bias.buckets(jnp.arange(-far, far + 1))].T


def at_distance(values: jax.Array, relative: Any) -> jax.Array:
    """Returns the bias [H, ...] of distances [...] int, from `distance_values`."""
    far = values.shape[1] // 2
    return values[:, jnp.clip(relative, -far, far) + far]
