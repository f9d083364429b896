"""Published parameter-efficient methods, each written as hooks: what the mechanism must carry."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import hooks, layers
from tests.trunks.hook_cases import Norm, Prefix

# Our site -> the module of a published RoBERTa layer.
SITES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "ffn.wi": "intermediate.dense",
    "ffn.wo": "output.dense",
}
_NORMAL = nn.initializers.normal(0.3)


def bottleneck(
    module: nn.Module, name: str, size: int, function: str = "relu"
) -> Callable[[jax.Array], jax.Array]:
    """u(x) = up(f(down(x))), with parameters `<name>_down` and `<name>_up` of `module`."""
    down = layers.Dense(size, ("embed", None), name=f"{name}_down", parent=module)

    def run(x: jax.Array) -> jax.Array:
        up = layers.Dense(x.shape[-1], (None, "embed"), name=f"{name}_up", parent=module)
        return up(layers.activation(function)(down(x)))

    return run


class Lora(hooks.Hooks):
    """y + scale * x A B at some sites."""

    sites: tuple[str, ...]
    rank: int
    scale: float = 1.0

    @nn.compact
    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site not in self.sites:
            return y
        a = self.param(f"{site}_a", _NORMAL, (x.shape[-1], self.rank))
        b = self.param(f"{site}_b", _NORMAL, (self.rank, y.shape[-1]))
        return y + self.scale * (x @ a @ b)


class Ia3(hooks.Hooks):
    """y * l at some sites."""

    sites: tuple[str, ...] = ("attention.key", "attention.value", "ffn.wi")

    @nn.compact
    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site not in self.sites:
            return y
        return y * self.param(site, nn.initializers.ones, y.shape[-1:])


class BitFit(hooks.Hooks):
    """A delta on the bias of every projection and norm."""

    @nn.compact
    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return y + self.param(site, _NORMAL, y.shape[-1:])


class Pfeiffer(hooks.Hooks):
    """Post-norm, behind the feed-forward: norm(s + r + u(norm(s + r)))."""

    size: int
    function: str = "relu"

    @nn.compact
    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        if site != "ffn":
            return x + y
        return x + y + bottleneck(self, site, self.size, self.function)(norm(x + y))


class Houlsby(hooks.Hooks):
    """Post-norm, behind both sub-layers: norm(s + r + u(s))."""

    size: int

    @nn.compact
    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        return x + y + bottleneck(self, site, self.size, "silu")(y)


class Parallel(hooks.Hooks):
    """Beside the feed-forward: norm(s + r + scale * u(r)); the scale is a parameter here."""

    size: int

    @nn.compact
    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        if site != "ffn":
            return x + y
        scale = self.param("scale", nn.initializers.ones, (1,))
        return x + y + scale * bottleneck(self, site, self.size)(x)


class GatedUnion(hooks.Hooks):
    """Prefix, LoRA and adapter, each times a gate: a mean over the tokens, one an example."""

    length: int
    rank: int
    size: int

    def setup(self) -> None:
        self.prefix = Prefix(self.length)
        names = ("attention.query", "attention.value", "prefix", "ffn")
        self.gates = {name: layers.Dense(1, ("embed", None)) for name in names}
        self.lora = {name: Lora((name,), self.rank) for name in names[:2]}
        self.adapter = Bottleneck(self.size)

    def gate(self, name: str, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.gates[name](x)).mean(1, keepdims=True)

    def output(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site in self.lora:
            y = y + self.gate(site, x) * (self.lora[site].output(site, x, y) - y)
        # The gate of the prefix stands at the tokens' keys and values.
        return y * self.gate("prefix", x) if site in ("attention.key", "attention.value") else y

    def keys_values(
        self, site: str, key: jax.Array, value: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return self.prefix.keys_values(site, key, value, bias)

    def residual(self, site: str, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        if site != "ffn":
            return x + y
        middle = norm(x + y)
        return x + y + self.gate("ffn", middle) * self.adapter(middle)


class Bottleneck(nn.Module):
    """up(relu(down(x)))."""

    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = layers.Dense(self.size, ("embed", None), name="down")(x)
        return layers.Dense(x.shape[-1], (None, "embed"), name="up")(jnp.maximum(inner, 0))
