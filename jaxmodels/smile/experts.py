"""The experts' feed-forward: over padded blocks of slots, or over rows grouped by expert."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.core import layers

Weights = Mapping[str, jax.Array]


def blocks(weights: Weights, x: jax.Array, activation: str) -> jax.Array:
    """act(x wi + bi) wo + bo for each expert's slots: [e, slots, d] -> the same shape and type.

    Products are accumulated in float32. With biases an empty slot gives values too: never sum
    over slots.

    Args:
      weights: `wi` [e, d, f], `wo` [e, f, d], optionally `bi` [e, f], `bo` [e, d].
      x: [e, slots, d].
      activation: see `core.layers.ACTIVATIONS`.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("eci,eio->eco", x, kernel.astype(x.dtype), preferred_element_type=wide)

    return _feed_forward(weights, x, activation, product, lambda bias: bias[:, None])


def rows(
    weights: Weights, x: jax.Array, group_sizes: jax.Array, activation: str, dense: bool = False
) -> jax.Array:
    """The same for rows sorted by expert: [rows, d] -> the same shape; zero behind the last group.

    Args:
      weights: see `blocks`.
      x: [rows, d]; the first group_sizes[0] rows are expert 0's, and so on.
      group_sizes: [e] int32; their sum is at most the rows.
      activation: see `core.layers.ACTIVATIONS`.
      dense: see `grouped_matmul`.
    """
    number = jnp.arange(x.shape[0])[:, None]
    ends = jnp.cumsum(group_sizes)
    inside = number < ends[-1]
    member = (number < ends) & (number >= ends - group_sizes)  # [rows, e]

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_matmul(x, kernel.astype(x.dtype), group_sizes, dense)

    def bias_of_rows(bias: jax.Array) -> jax.Array:
        return member.astype(bias.dtype) @ bias

    x = jnp.where(inside, x, 0)
    y = _feed_forward(weights, x, activation, product, bias_of_rows)
    return jnp.where(inside, y, jnp.zeros((), y.dtype))


def grouped_matmul(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, dense: bool = False
) -> jax.Array:
    """Multiplies groups of rows by a kernel each: [rows, d], [e, d, f] -> [rows, f] float32.

    Args:
      x: [rows, d], sorted by group.
      kernels: [e, d, f].
      group_sizes: [e] int32; rows behind their sum give zero (and get no gradient).
      dense: every row by every kernel, then the right one chosen: for cells that share a device,
        since the gradient of `lax.ragged_dot` cannot be mapped over an axis. On a CPU that is
        what XLA makes of a ragged product anyway.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if kernels.shape[0] == 1:
        return jnp.matmul(x, kernels[0], preferred_element_type=wide)
    if not dense:
        return jax.lax.ragged_dot(x, kernels, group_sizes, preferred_element_type=wide)
    number, ends = jnp.arange(x.shape[0])[:, None], jnp.cumsum(group_sizes)
    member = (number < ends) & (number >= ends - group_sizes)
    every = jnp.einsum("rd,edf->ref", x, kernels, preferred_element_type=wide)
    return jnp.where(member[:, :, None], every, 0).sum(1)


def _feed_forward(
    weights: Weights, x: jax.Array, activation: str, product: Any, bias: Any
) -> jax.Array:
    function = layers.activation(activation)
    hidden = product(x, weights["wi"])
    if "bi" in weights:
        hidden = hidden + bias(weights["bi"]).astype(hidden.dtype)
    out = product(function(hidden).astype(x.dtype), weights["wo"])
    if "bo" in weights:
        out = out + bias(weights["bo"]).astype(out.dtype)
    return out.astype(x.dtype)
