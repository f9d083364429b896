"""Encoder layers whose attention reads few keys a query, on the parameters of a dense trunk.

A pattern (`Window`, `LongT5`, `BigBird`) says which keys; the layer keeps the trunk's projections,
norms, feed-forward, dropouts and hooks, so that one checkpoint runs dense, windowed or compressed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core import blocks, layers, stack
from jaxmodels.trunks import t5
from jaxmodels.vcc.baseline_attentions import chunks
from jaxmodels.vcc.baseline_attentions.chunks import Drop, Keys


@struct.dataclass
class Sequences:
    """What a pattern is prepared from, once for all layers.

    Attributes:
      keep: [B, n] bool, False on padding.
      vip: [B, n] bool, or None.
      values: bias of each distance, [H, 2 far + 1] (`chunks.distance_values`); None without.
      side_values: the same between tokens and summaries of blocks, in blocks.
    """

    keep: jax.Array
    vip: jax.Array | None = None
    values: jax.Array | None = None
    side_values: jax.Array | None = None


@struct.dataclass
class Heads:
    """What a pattern mixes.

    Attributes:
      query: [B, n, H, D], scaled.
      key, value: [B, n, H, D].
      front: keys that every query reads besides: a prefix of hooks.
      side: keys and values of the summaries, where the pattern has them.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    front: tuple[Keys, ...] = ()
    side: Keys | None = None


@dataclasses.dataclass(frozen=True)
class SparsePattern:
    """Which keys a query reads; a baseline derives from it."""

    @property
    def summarises(self) -> bool:
        """Blocks are summed and normed into keys; the layer then has a `global_norm`."""
        return False

    def prepare(self, given: Sequences, num_heads: int, num_layers: int) -> Any:
        """Returns what all layers share: masks, indices, position biases."""
        raise NotImplementedError

    def summaries(self, x: jax.Array, state: Any) -> jax.Array:
        """Returns the sums of blocks [B, G, d] float32 of the input [B, n, d] of the attention."""
        raise NotImplementedError

    def mix(self, heads: Heads, state: Any, layer: jax.Array | int, drop: Drop | None) -> jax.Array:
        """Returns the mixed values [B, n, H, D] of layer number `layer`."""
        raise NotImplementedError


class SparseLayer(blocks.TransformerLayer):
    """The trunk's layer with the attention of a pattern: the trunk's parameters.

    Only patterns that summarise add one: `global_norm`. Hooks work as in the dense layer, with
    prefixes read by every query; rows of padding are finite and mean nothing.

    Attributes:
      pattern: which keys a query reads.
    """

    pattern: SparsePattern = SparsePattern()

    def setup(self) -> None:
        super().setup()
        if self.pattern.summarises:
            self.global_norm = layers.RMSNorm(self.norm_eps, self.dtype)

    def __call__(
        self, x: jax.Array, bias: Any = None, deterministic: bool = True, **unused: Any
    ) -> jax.Array:
        """Runs one layer: [B, n, d_model] -> the same shape.

        Args:
          x: the residual stream.
          bias: what the pattern prepared; None attends to everything.
          deterministic: no dropout.
          **unused: what dense layers take besides, all None.
        """
        run = functools.partial(self._attend, state=bias, deterministic=deterministic)
        return self._run(x, run, run, deterministic)

    def _attend(self, x: jax.Array, state: Any, deterministic: bool) -> jax.Array:
        side, parts = None, self.attention
        if self.pattern.summarises:
            made = x if state is None else self.pattern.summaries(x, state)
            side = self.global_norm(made)  # also where parameters are made
        if state is None:
            return parts(x, deterministic=deterministic)
        if side is not None:  # a text shorter than a block has none
            side = Keys(parts.keys(side), parts.values(side)) if side.shape[1] else None
        query, key, value = parts.queries(x), parts.keys(x), parts.values(x)
        heads = Heads(query, key, value, self._front(key[:, :0]), side)
        drop = None
        if self.attention_dropout_rate and not deterministic:
            drop = functools.partial(parts.dropout, deterministic=False)
        number = self.get_variable("params", "number", 0)
        return parts.project_out(self.pattern.mix(heads, state, number, drop))

    def _front(self, none: jax.Array) -> tuple[Keys, ...]:
        """What hooks put in front of no keys at all."""
        if self.hooks is None:
            return ()
        bias = jnp.zeros((1, 1, 1, 0), jnp.float32)
        key, value, bias = self.hooks.keys_values("attention", none, none, bias)
        if not key.shape[1]:
            return ()
        return (Keys(key, value, None if bias is None else bias[:, None]),)


def _numbered(runs: list[tuple[int, nn.Module, Any]]) -> list[tuple[int, nn.Module, Any]]:
    """Gives each layer its number beside its parameters: patterns may differ by layer."""
    found = []
    for start, layer, params in runs:
        count = jax.tree.leaves(params)[0].shape[0]
        found.append((start, layer, {**params, "number": jnp.arange(start, start + count)}))
    return found


class SparseStack(stack.Stack):
    """`stack.Stack` of sparse layers; a trunk without position bias."""

    def setup(self) -> None:
        super().setup()
        self.runs = _numbered(self.runs)

    def prepare(self, mask: jax.Array, vip_mask: jax.Array | None = None) -> Any:
        """Returns what the layers take as their bias, from 0/1 masks [B, n]."""
        given = Sequences(mask > 0, None if vip_mask is None else vip_mask > 0)
        return self.layer.pattern.prepare(given, self.layer.num_heads, self.num_layers)


class SparseT5Stack(t5.T5Stack):
    """T5's encoder of sparse layers, with its position bias.

    Patterns that summarise have a second table, `global_relative_bias`, for distances in blocks.
    """

    def setup(self) -> None:
        super().setup()
        self.runs = _numbered(self.runs)
        if self.layer.pattern.summarises:
            self.global_relative_bias = self.bias.clone(parent=None)

    def prepare(self, mask: jax.Array, vip_mask: jax.Array | None = None) -> Any:
        """Returns what the layers take as their bias, from 0/1 masks [B, n]."""
        side = None
        if self.layer.pattern.summarises:
            side = chunks.distance_values(self.global_relative_bias)
        vip = None if vip_mask is None else vip_mask > 0
        given = Sequences(mask > 0, vip, chunks.distance_values(self.relative_bias), side)
        return self.layer.pattern.prepare(given, self.layer.num_heads, self.num_layers)
