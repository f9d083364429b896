"""Dispatch and combine with their gradients, by the implementation that fits the platform.

Moving rows is a permutation with holes, so its transpose is a gather by the inverse map. Autodiff
of `x[index]` would give a scatter-add with a sort instead; hence the custom gradients.

On GPUs and CPUs the implementation is XLA's: gather, selection and product become one fusion that
reads each row once. On TPUs `mosaic` keeps a block of row copies in flight.
"""

import functools
from collections.abc import Callable

import jax

from kernels_pallas.expert_dispatch import reference, tpu
from kernels_pallas.expert_dispatch.reference import inverse

__all__ = ["IMPLEMENTATIONS", "combine", "inverse", "take_rows"]

IMPLEMENTATIONS = ("xla", "mosaic", "mosaic_interpret")
Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(x: Array, index: Array, back: Array, implementation: str | None = None) -> Array:
    """Returns x[index], zero where an index is outside: [rows, d] -> [len(index), d].

    Args:
      x: [rows, d].
      index: [out rows] int32; no row of x is taken twice.
      back: [rows] int32, `inverse(index, rows)`; the gradient is gathered by it.
      implementation: "xla"; "mosaic" (TPU); "mosaic_interpret" (the same anywhere, for tests);
        None: mosaic where the program is lowered for a TPU and takes such rows, else xla.

    Raises:
      ValueError: an unknown implementation, or rows that it does not take.
    """
    return _take(x, index, implementation)


def _take(x: Array, index: Array, implementation: str | None) -> Array:
    return _choose(implementation, x, reference.take_rows, tpu.take_rows)(x, index)


def _take_forward(
    x: Array, index: Array, back: Array, implementation: str | None
) -> tuple[Array, Array]:
    return _take(x, index, implementation), back


def _take_backward(implementation: str | None, back: Array, dy: Array) -> tuple[Array, None, None]:
    return _take(dy, back, implementation), None, None


take_rows.defvjp(_take_forward, _take_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def combine(
    x: Array, index: Array, gate: Array, back: Array, implementation: str | None = None
) -> Array:
    """Returns gate * x[index], zero where an index is outside: [rows, d] -> [len(index), d].

    Args:
      x: [rows, d].
      index: [out rows] int32; no row of x is taken twice.
      gate: [out rows] float32; the product is rounded once to x's type.
      back: [rows] int32, `inverse(index, rows)`.
      implementation: see `take_rows`.

    Raises:
      ValueError: see `take_rows`.
    """
    return _combine(x, index, gate, implementation)


def _combine(x: Array, index: Array, gate: Array, implementation: str | None) -> Array:
    return _choose(implementation, x, reference.combine, tpu.combine)(x, index, gate)


def _combine_forward(
    x: Array, index: Array, gate: Array, back: Array, implementation: str | None
) -> tuple[Array, tuple[Array, ...]]:
    return _combine(x, index, gate, implementation), (x, index, gate, back)


def _combine_backward(
    implementation: str | None, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, None, Array, None]:
    x, index, gate, back = kept
    dx = _combine(dy, back, reference.take_values(gate, back), implementation)
    # The rows are gathered once more instead of kept: they are as large as the layer's output.
    dgate = reference.row_products(_take(x, index, implementation), dy, gate.dtype)
    return dx.astype(x.dtype), None, dgate, None


combine.defvjp(_combine_forward, _combine_backward)


def _choose(
    implementation: str | None, x: Array, plain: Callable[..., Array], mosaic: Callable[..., Array]
) -> Callable[..., Array]:
    if implementation == "xla":
        return plain
    why = tpu.supported(x)
    if implementation is None:
        if why:
            return plain
        return functools.partial(jax.lax.platform_dependent, tpu=mosaic, default=plain)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: use one of {IMPLEMENTATIONS}.")
    if why:
        raise ValueError(f"implementation={implementation!r}: {why}; use 'xla'.")
    return functools.partial(mosaic, interpret=implementation == "mosaic_interpret")
