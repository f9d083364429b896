"""For the tests of trunks: small hooks as methods have them, and decoding step by step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import hooks

Norm = Callable[[jax.Array], jax.Array]


class Delta(hooks.Hooks):
    """LoRA: adds x A B to the output of the query and of the value projection of `attention`.

    Attributes:
      features: of the projections.
    """

    features: int
    rank: int = 2

    @nn.compact
    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site not in ("attention.query", "attention.value"):
            return y
        name = site.removeprefix("attention.")
        init = nn.initializers.normal(0.3)
        down = self.param(f"{name}_down", init, (x.shape[-1], self.rank))
        up = self.param(f"{name}_up", init, (self.rank, self.features))
        return y + x @ down @ up


class Prefix(hooks.Hooks):
    """Puts keys and values [length, heads, width] in front, at all sub-layers that attend.

    Attributes:
      length: of the prefix.
    """

    length: int = 3

    @nn.compact
    def keys_values(
        self, site: str, key: jax.Array, value: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        rows, _, heads, width = key.shape
        shape = (2, self.length, heads, width)
        made = self.param(site, nn.initializers.normal(1.0), shape)
        front = jnp.broadcast_to(made[:, None], (2, rows, *shape[1:]))
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (self.length, 0)))
        return (
            jnp.concatenate([front[0], key], axis=1),
            jnp.concatenate([front[1], value], axis=1),
            bias,
        )


class Bottleneck(hooks.Hooks):
    """An adapter behind the feed-forward of a post-norm layer: x + y + u(y), where u(y) = y W."""

    @nn.compact
    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        if site != "ffn":
            return x + y
        kernel = self.param("kernel", nn.initializers.normal(0.3), (x.shape[-1],) * 2)
        return x + y + y @ kernel


def replayed(model: nn.Module, variables: Any, first: Any, tokens: jax.Array) -> jax.Array:
    """Logits [B, 1 + T, vocab]: those of `first`, from `start`, then of each of tokens [B, T]."""

    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = model.apply(variables, token, cache, first.fixed, method="step")
        return cache, logits

    _, rest = jax.lax.scan(step, first.cache, tokens.T)
    return jnp.concatenate([first.logits[:, None], rest.swapaxes(0, 1)], axis=1)
