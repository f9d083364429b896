"""Routers and the places of tokens: which bucket a token chooses, and which slot of it it gets.

Symbols of the paper: p, q are the probabilities of the two routers, a, b their choices, C the
capacity of a bucket, s the position of a token among those that chose the same bucket.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct


def capacity(tokens: int, buckets: int, factor: float, minimum: int = 1, multiple: int = 1) -> int:
    """Returns the slots of a bucket: factor * tokens / buckets, rounded up.

    Args:
      tokens: rows that are routed.
      buckets: that they may choose.
      factor: room beyond an even split.
      minimum: slots at least.
      multiple: the result is rounded up to a multiple of it (8 or 16 suit a TPU's tiles).

    Raises:
      ValueError: a factor that is not a positive number, or a minimum or multiple below 1.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(
            f"capacity_factor={factor}: accepted are positive numbers, or None for no capacity "
            "at all (dropless)."
        )
    if minimum < 1 or multiple < 1:
        raise ValueError(f"minimum capacity {minimum}, multiple {multiple}: both at least 1.")
    slots = max(minimum, math.ceil(factor * tokens / buckets - 1e-9))
    return -(-slots // multiple) * multiple


@struct.dataclass
class Route:
    """What a router says of every row.

    Attributes:
      logits: [rows, K] float32.
      probs: [rows, K] float32, the softmax over all K.
      index: [rows] int32, the choice; the lowest index wins ties.
      gate: [rows] float32, the probability of the choice.
      valid: [rows] bool; the others are not routed.
    """

    logits: jax.Array
    probs: jax.Array
    index: jax.Array
    gate: jax.Array
    valid: jax.Array


def route(
    x: jax.Array, kernel: jax.Array, valid: jax.Array, noise: jax.Array | None = None
) -> Route:
    """Returns the choices of a top-1 router, made in float32 (section 8) whatever x's type.

    A row whose logits are not all finite chooses bucket 0.

    Args:
      x: [rows, d].
      kernel: [d, K].
      valid: [rows] bool.
      noise: [rows, d], multiplied to what the router sees (`jitter_noise`); None: none.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    seen = x.astype(dtype)
    # A masked row that is NaN or infinite would reach the kernel's gradient as 0 * NaN.
    seen = jnp.where((valid | jnp.isfinite(seen).all(-1))[:, None], seen, 0)
    if noise is not None:
        seen = seen * noise.astype(dtype)
    logits = jnp.matmul(seen, kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    probs = jax.nn.softmax(logits, axis=-1)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    index = jnp.where(jnp.isfinite(logits).all(-1), best, 0)
    gate = jnp.where(jax.nn.one_hot(index, kernel.shape[-1], dtype=bool), probs, 0).sum(-1)
    return Route(logits, probs, index, gate, valid)


def jitter_noise(key: jax.Array, shape: tuple[int, ...], eps: float) -> jax.Array:
    """Returns uniform noise in [1 - eps, 1 + eps], float32: Switch's jitter of a router's input."""
    return jax.random.uniform(key, shape, jnp.float32, 1.0 - eps, 1.0 + eps)


def positions(index: jax.Array, valid: jax.Array, buckets: int) -> jax.Array:
    """Returns how many valid rows before each chose the same bucket; -1 on rows not valid.

    Counted in int32: float32 is exact only to 2^24 rows, bfloat16 to 256.

    Args:
      index: [rows] int32 below `buckets`.
      valid: [rows] bool.
      buckets: K.
    """
    chosen = _one_hot(index, valid, buckets)
    return (jnp.cumsum(chosen, axis=0) * chosen).sum(-1, dtype=jnp.int32) - 1


def counts(index: jax.Array, valid: jax.Array, buckets: int) -> jax.Array:
    """Returns int32 [buckets], the valid rows of each bucket."""
    return _one_hot(index, valid, buckets).sum(0, dtype=jnp.int32)


def _one_hot(index: jax.Array, valid: jax.Array, buckets: int) -> jax.Array:
    return jax.nn.one_hot(index, buckets, dtype=jnp.int32) * valid[:, None].astype(jnp.int32)


@struct.dataclass
class Slots:
    """Places of rows in a buffer of `buckets` times `capacity` slots.

    Attributes:
      position: [rows] int32, see `positions`.
      kept: [rows] bool; valid, and within the capacity.
      slot: [rows] int32 in the flat buffer; -1 where not kept.
    """

    position: jax.Array
    kept: jax.Array
    slot: jax.Array


def slots(routed: Route, buckets: int, capacity: int) -> Slots:
    """Returns first-come places: rows beyond a bucket's capacity get none."""
    position = positions(routed.index, routed.valid, buckets)
    kept = routed.valid & (position < capacity)
    slot = jnp.where(kept, routed.index * capacity + position, -1)
    return Slots(position, kept, slot)
