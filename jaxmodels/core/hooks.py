"""How a method changes a trunk's layers without copying them: named points, and a module for them.

A layer calls its hooks at every point where a published method puts something: LoRA, (IA)^3 and
BitFit at the outputs of projections and norms; prefixes at keys and values; adapters where a
branch joins the residual stream; another attention or feed-forward around a sub-layer; deep
prompts and added sub-layers at the entry. A trunk holds hooks by groups of layers (`LayerHooks`),
so that every group may have modules of its own sizes. docs/adding_a_method.md shows each in use.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

# The sub-layers of a layer; sites of their parts are "attention.query", "ffn.wi", ...
SUBLAYERS = ("attention", "cross_attention", "ffn")


class Hooks(nn.Module):
    """Changes nothing; a method overrides what it needs and makes its parts in `setup`.

    Parameters are created where the layer's are, one set a layer. A hook that drops values does so
    where `self.has_rng("dropout")`: no dropout rng, no dropout. What it sows into "intermediates"
    reaches whoever calls the model with `mutable=["intermediates"]`, stacked over the layers.
    """

    def enter(self, layer: nn.Module, x: jax.Array) -> jax.Array:
        """Returns the input of the layer: deep prompts, or a sub-layer in front of the others.

        Args:
          layer: the layer itself, whose parts may be used again (`layer.attention`, its norms).
          x: [batch, length, d_model], the residual stream.
        """
        return x

    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns what stands for `y`, the output of a projection or a norm for input `x`.

        Args:
          site: "<sub-layer>.<part>": attention.query, .key, .value, .out (and cross_attention's),
            ffn.wi (or .wi_0, .wi_1), .wo; "attention_norm", "cross_attention_norm", "ffn_norm".
          x: [..., d_in].
          y: [..., d_out].
        """
        return y

    def keys_values(
        self, site: str, key: jax.Array, value: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns keys, values and bias that a sub-layer attends to: a prefix goes in front.

        Args:
          site: "attention" or "cross_attention".
          key: [batch, keys, heads, width].
          value: the same shape.
          bias: None, or broadcastable to [batch, heads, queries, keys]; give the new keys theirs.
        """
        return key, value, bias

    def sublayer(self, site: str, run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """Returns the output of a sub-layer; `run(x)` is the trunk's own.

        Args:
          site: one of `SUBLAYERS`.
          run: [batch, length, d_model] -> the same shape.
          x: after the norm where that stands in front.
        """
        return run(x)

    def residual(
        self, site: str, x: jax.Array, y: jax.Array, norm: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Returns the sum of residual stream `x` and branch `y`; adapters add themselves here.

        Args:
          site: one of `SUBLAYERS`.
          x: [batch, length, d_model] float32, the input of the sub-layer (before its norm).
          y: the same shape, after dropout.
          norm: the sub-layer's norm: in front of it (pre) or applied to what is returned (post).
        """
        return x + y


class Chain(Hooks):
    """Several hooks in one: each sees what those before it made; the last is outermost around.

    Attributes:
      parts: hooks, in order.
    """

    parts: Sequence[Hooks] = ()

    def enter(self, layer: nn.Module, x: jax.Array) -> jax.Array:
        """See `Hooks.enter`."""
        for part in self.parts:
            x = part.enter(layer, x)
        return x

    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """See `Hooks.output`."""
        for part in self.parts:
            y = part.output(site, x, y)
        return y

    def keys_values(
        self, site: str, key: jax.Array, value: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """See `Hooks.keys_values`."""
        for part in self.parts:
            key, value, bias = part.keys_values(site, key, value, bias)
        return key, value, bias

    def sublayer(self, site: str, run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """See `Hooks.sublayer`."""
        for part in self.parts:
            run = _around(part, site, run)
        return run(x)

    def residual(
        self, site: str, x: jax.Array, y: jax.Array, norm: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """See `Hooks.residual`: each part gets x and a branch that holds what the others added."""
        for part in self.parts:
            y = part.residual(site, x, y, norm) - x
        return x + y


def _around(
    part: Hooks, site: str, run: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    return lambda x: part.sublayer(site, run, x)


@dataclasses.dataclass(frozen=True)
class LayerHooks:
    """The hooks of layers start..stop-1 of a stack; their parameters stand at `hooks_<start>`.

    Attributes:
      hooks: unbound module; each layer of the group has parameters of its own.
      start: first layer.
      stop: behind the last layer; None: to the end.
      step: 2 takes every second layer: for trunks whose layers alternate.
    """

    hooks: Hooks
    start: int = 0
    stop: int | None = None
    step: int = 1


def owners(given: Sequence[LayerHooks], num_layers: int) -> list[int | None]:
    """Returns for each layer the number in `given` of its hooks, or None.

    Raises:
      ValueError: a group is empty, outside the stack, or overlaps another.
    """
    found: list[int | None] = [None] * num_layers
    for number, group in enumerate(given):
        stop = num_layers if group.stop is None else group.stop
        if not 0 <= group.start < stop <= num_layers or group.step < 1:
            raise ValueError(
                f"hooks of layers {group.start}..{stop - 1} (step {group.step}), but the stack has "
                f"layers 0..{num_layers - 1}; choose 0 <= start < stop <= {num_layers}, step >= 1."
            )
        for layer in range(group.start, stop, group.step):
            if found[layer] is not None:
                raise ValueError(
                    f"two hooks for layer {layer}; put both into one hooks.Chain((a, b))."
                )
            found[layer] = number
    return found


def groups(given: Sequence[LayerHooks], num_layers: int) -> list[tuple[int, int, Any]]:
    """Returns (start, stop, hooks or None) of runs of layers that cover the stack in order.

    Raises:
      ValueError: as `owners`.
    """
    found: list[tuple[int, int, Any]] = []
    for owner, run in itertools.groupby(enumerate(owners(given, num_layers)), lambda x: x[1]):
        layers = [layer for layer, _ in run]
        module = None if owner is None else given[owner].hooks
        found.append((layers[0], layers[-1] + 1, module))
    return found
