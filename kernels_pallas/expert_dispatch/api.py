"""Dispatch and combine with their gradients, by the implementation that fits the platform.

Moving rows is a permutation with holes, so its transpose is a gather by the inverse map. Autodiff
of `x[index]` would give a scatter-add with a sort instead; hence the custom gradients.
"""

import jax

from kernels_pallas.expert_dispatch import reference
from kernels_pallas.expert_dispatch.reference import inverse

__all__ = ["combine", "inverse", "take_rows"]


@jax.custom_vjp
def take_rows(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Returns x[index], zero where an index is outside: [rows, d] -> [len(index), d].

    Args:
      x: [rows, d].
      index: [out rows] int32; no row of x is taken twice.
      back: [rows] int32, `inverse(index, rows)`; the gradient is gathered by it.
    """
    return reference.take_rows(x, index)


def _take_forward(x: jax.Array, index: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return take_rows(x, index, back), back


def _take_backward(back: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
    return reference.take_rows(dy, back), None, None


take_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def combine(x: jax.Array, index: jax.Array, gate: jax.Array, back: jax.Array) -> jax.Array:
    """Returns gate * x[index], zero where an index is outside: [rows, d] -> [len(index), d].

    Args:
      x: [rows, d].
      index: [out rows] int32; no row of x is taken twice.
      gate: [out rows] float32; the product is rounded once to x's type.
      back: [rows] int32, `inverse(index, rows)`.
    """
    return reference.combine(x, index, gate)


def _combine_forward(
    x: jax.Array, index: jax.Array, gate: jax.Array, back: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return combine(x, index, gate, back), (x, index, gate, back)


def _combine_backward(
    kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, None, jax.Array, None]:
    dx, dgate = reference.combine_gradients(*kept, dy)
    return dx, None, dgate, None


combine.defvjp(_combine_forward, _combine_backward)
