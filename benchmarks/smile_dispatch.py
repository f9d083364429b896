"""Tokens into the slots of experts and back on one device, three ways (part of smile_all2all).

Question: what does the library's dispatch cost beside a plain scatter and gather, and beside the
one-hot products of Mesh TensorFlow and Switch?

  library   `kernels_pallas.expert_dispatch`: gathers there and back, in the gradient as well
  scatter   `zeros.at[slot].set(x)`, then `buffer[slot]`; gradients by autodiff
  one-hot   a matrix [tokens, slots] of zeros and ones, multiplied there and back

On a TPU also `library, mosaic`, the Pallas kernel. Routing is done beforehand and the experts are
left out: their place is held by a barrier that the compiler does not move anything across.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from jaxmodels.smile import routing
from kernels_pallas import expert_dispatch

Array = jax.Array
Function = Callable[[Array, Array, Array], Array]
CAPACITY_FACTOR = 1.25


def sides(slots: int) -> dict[str, Function]:
    """Returns {side: (x [T, d], slot [T], gate [T]) -> y [T, d]} for a buffer of `slots` rows."""

    def library(implementation: str) -> Function:
        def function(x: Array, slot: Array, gate: Array) -> Array:
            row = expert_dispatch.inverse(slot, slots)
            buffer = expert_dispatch.take_rows(x, row, slot, implementation)
            buffer = jax.lax.optimization_barrier(buffer)
            return expert_dispatch.combine(buffer, slot, gate, row, implementation)

        return function

    found = {"library": library("xla"), "scatter": _scatter(slots), "one-hot": _one_hot(slots)}
    if jax.default_backend() == "tpu":
        found["library, mosaic"] = library("mosaic")
    return found


def _scatter(slots: int) -> Function:
    def function(x: Array, slot: Array, gate: Array) -> Array:
        place = jnp.where(slot < 0, slots, slot)  # outside: dropped there, zero on the way back
        buffer = jnp.zeros((slots, x.shape[1]), x.dtype).at[place].set(x, mode="drop")
        buffer = jax.lax.optimization_barrier(buffer)
        return gate[:, None] * buffer.at[place].get(mode="fill", fill_value=0)

    return function


def _one_hot(slots: int) -> Function:
    def function(x: Array, slot: Array, gate: Array) -> Array:
        mask = jax.nn.one_hot(slot, slots, dtype=x.dtype)  # -1: a row of zeros
        buffer = jax.lax.optimization_barrier(jnp.einsum("ts,td->sd", mask, x))
        return jnp.einsum("ts,sd->td", mask * gate[:, None], buffer)

    return function


def inputs(tokens: int, d_model: int, experts: int) -> tuple[int, tuple[Array, ...]]:
    """Returns the number of slots, and (x, slot, gate) of a random router."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((tokens, d_model), np.float32))
    kernel = jnp.asarray(draw.standard_normal((d_model, experts), np.float32) * d_model**-0.5)
    capacity = routing.capacity(tokens, experts, CAPACITY_FACTOR)
    routed = routing.route(x, kernel, jnp.ones(tokens, bool))
    slot = routing.slots(routed, experts, capacity).slot
    return experts * capacity, (x, slot, routed.gate)


def with_gradient(function: Function) -> Callable[..., Any]:
    """Returns the function's value beside its gradients by x and gate, y weighed by itself."""

    def loss(x: Array, gate: Array, slot: Array) -> Array:
        return (function(x, slot, gate) ** 2).sum()

    return lambda x, slot, gate: jax.value_and_grad(loss, argnums=(0, 1))(x, gate, slot)


def measure_size(
    size: tuple[int, int, int], rounds: int, seconds_budget: float
) -> list[dict[str, Any]]:
    """Returns a row a side, forward and forward with backward.

    Args:
      size: (tokens, d_model, experts).
      rounds: at most.
      seconds_budget: for both directions together.

    Raises:
      RuntimeError: the sides do not agree.
    """
    slots, arguments = inputs(*size)
    found = []
    for kind, share, wrap in (
        ("forward", 0.3, lambda f: f),
        ("forward+backward", 0.7, with_gradient),
    ):
        programs = {
            side: jax.jit(wrap(function)).lower(*arguments).compile()
            for side, function in sides(slots).items()
        }
        _check({side: program(*arguments) for side, program in programs.items()})
        runs = {side: lambda p=program: p(*arguments) for side, program in programs.items()}
        times = measure.compare(runs, rounds=rounds, seconds_budget=share * seconds_budget)
        for side, told in times.to_dict().items():
            peak = measure.peak_bytes(programs[side])
            row = {"kind": kind, "size": size, "slots": slots, "side": side}
            found.append(row | told | {"peak_mb": None if peak is None else peak / 1e6})
    return found


def _check(results: dict[str, Any]) -> None:
    wanted = jax.tree.leaves(results["library"])
    for side, result in results.items():
        for one, other in zip(wanted, jax.tree.leaves(result), strict=True):
            if not np.allclose(one, other, rtol=1e-3, atol=1e-3):
                raise RuntimeError(f"the dispatch of {side!r} differs from the library's.")


def measure_all(
    sizes: Sequence[tuple[int, int, int]], *, rounds: int = 20, budget_s: float = 45.0
) -> list[dict[str, Any]]:
    """Returns the rows of all sizes, within about `budget_s` seconds."""
    began, found = time.perf_counter(), []
    for number, size in enumerate(sizes):  # what small sizes do not need, large ones have
        left = max(budget_s - (time.perf_counter() - began), 1.0)
        found += measure_size(size, rounds, left / (len(sizes) - number))
    return found
