"""Dispatch and weighted combine in plain JAX: the definition that every kernel must equal."""

import jax
import jax.numpy as jnp


def inverse(index: jax.Array, size: int) -> jax.Array:
    """Returns int32 [size]: for each value below `size` where in `index` it stands, else -1.

    Args:
      index: [rows] int32; values outside 0..size-1 stand nowhere, the others are all different.
      size: length of the result.
    """
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)
    outside = (index < 0) | (index >= size)
    empty = jnp.full((size,), -1, jnp.int32)
    return empty.at[jnp.where(outside, size, index)].set(rows, mode="drop")


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[index], zero where an index is outside: [rows, d] -> [len(index), d]."""
    inside = (index >= 0) & (index < x.shape[0])
    taken = jnp.take(x, jnp.where(inside, index, 0), axis=0, mode="clip")
    return jnp.where(inside[:, None], taken, jnp.zeros((), x.dtype))


def combine(x: jax.Array, index: jax.Array, gate: jax.Array) -> jax.Array:
    """Returns gate * x[index], zero where an index is outside; [len(index), d] in x's type.

    The product is made in the gate's type (float32 or wider) and rounded once.
    """
    taken = take_rows(x, index).astype(gate.dtype)
    inside = (index >= 0) & (index < x.shape[0])
    # Selected, not multiplied by zero: the gate of a row that went nowhere may be NaN.
    return jnp.where(inside[:, None], gate[:, None] * taken, 0).astype(x.dtype)


def take_values(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[index], zero where an index is outside: [rows] -> [len(index)]."""
    return take_rows(x[:, None], index)[:, 0]


def row_products(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the inner product of each two rows, summed in `dtype`: [rows, d] twice -> [rows]."""
    return (a.astype(dtype) * b.astype(dtype)).sum(-1)
