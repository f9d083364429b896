"""The smallest layers, with logical axis names: dense, norms, embedding table, feed-forward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core.hooks import Hooks

Initializer = Callable[..., jax.Array]


@functools.cache
def normal(std: float) -> Initializer:
    """Returns the initialiser N(0, std^2): the same one every time, so that layers compare equal.

    A layer is a static argument of compiled functions: an unequal one would compile them again.
    """
    return nn.initializers.normal(std)


def partitioned(init: Initializer, names: Sequence[str | None]) -> Initializer:
    """Returns `init` with its result boxed: names are logical axes of `core.partitioning`."""
    return nn.with_logical_partitioning(init, tuple(names))


@struct.dataclass
class Turned:
    """A kernel held as [d_out, d_in]; see `for_few_rows`."""

    kernel: jax.Array

    def astype(self, dtype: Any) -> "Turned":
        """Returns it in another type, as an array's own `astype`."""
        return Turned(self.kernel.astype(dtype))


def for_few_rows(kernel: jax.Array) -> jax.Array | Turned:
    """Returns a kernel [d_in, d_out] as `product` reads it fastest when few rows are multiplied.

    On a CPU a float32 kernel is turned round, to be the left side: the library there packs its
    right side anew at every product, which for few rows costs more than the product. Others stay.
    """
    turn = kernel.dtype == jnp.float32 and jax.default_backend() == "cpu"
    return Turned(kernel.T) if turn else kernel


def product(x: jax.Array, kernel: jax.Array | Turned) -> jax.Array:
    """Returns x [..., d_in] times kernel [d_in, d_out], accumulated in float32: [..., d_out]."""
    if isinstance(kernel, Turned):
        axes = (((1,), (x.ndim - 1,)), ((), ()))
        y = jax.lax.dot_general(kernel.kernel, x, axes, preferred_element_type=jnp.float32)
        # Without the barrier the compiler puts the sides back in the usual order.
        return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, preferred_element_type=jnp.float32)


class Dense(nn.Module):
    """x W + b over the last axis: [..., d_in] -> [..., features].

    Attributes:
      features: d_out.
      axes: logical axis names of the kernel [d_in, d_out].
      use_bias: adds b.
      dtype: of the product (parameters stay float32); float32 accumulation.
      kernel_init: initialiser of the kernel.
    """

    features: int
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Initializer = normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Turned):  # only a decoding loop holds turned ones
            init, shape = partitioned(self.kernel_init, self.axes), (x.shape[-1], self.features)
            kernel = self.param("kernel", init, shape, jnp.float32)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias_init = partitioned(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", bias_init, (self.features,), jnp.float32)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32 and cast to `dtype`."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1:]
        scale = self.param("scale", partitioned(nn.initializers.ones, ("embed",)), d, jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("embed",)), d, jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm (T5, Llama) over the last axis, in float32, cast to `dtype`."""

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        power = jnp.square(x).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(power + self.eps) * scale).astype(self.dtype)


class Embedding(nn.Module):
    """Table [size, features] in float32; ids [...] -> [..., features] float32.

    Attributes:
      size: rows.
      features: columns.
      axes: logical axis names of the table.
      embedding_init: initialiser of the table.
    """

    size: int
    features: int
    axes: tuple[str | None, str | None] = ("vocab", "embed")
    embedding_init: Initializer = normal(0.02)

    def setup(self) -> None:
        init = partitioned(self.embedding_init, self.axes)
        self.embedding = self.param("embedding", init, (self.size, self.features), jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding, ids, axis=0)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x): CLIP's stand-in for the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


# By the names that checkpoints' settings use; "gelu" is the exact one (erf).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the pointwise function called `name`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: use one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class FeedForward(nn.Module):
    """wo(dropout(f(wi(x)))), or gated wo(dropout(f(wi_0(x)) * wi_1(x))): [..., d] -> [..., d].

    Attributes:
      d_ff: inner width.
      activation: name of f in `ACTIVATIONS`.
      gated: two inner projections (T5 v1.1: GEGLU, Llama: SwiGLU).
      use_bias: the projections have biases.
      dropout_rate: on the inner values while training.
      dtype: of the matrix products.
      wi_init: of the inner kernels.
      wo_init: of the outer kernel.
      hooks: called at "ffn.wi" (or "ffn.wi_0", "ffn.wi_1") and "ffn.wo".
    """

    d_ff: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    wi_init: Initializer = normal(0.02)
    wo_init: Initializer = normal(0.02)
    hooks: Hooks | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        function, d_model = activation(self.activation), x.shape[-1]

        def inner(name: str) -> jax.Array:
            dense = Dense(
                self.d_ff, ("embed", "mlp"), self.use_bias, self.dtype, self.wi_init, name=name
            )
            return self._hooked(name, x, dense(x))

        if self.gated:
            hidden = function(inner("wi_0")) * inner("wi_1")
        else:
            hidden = function(inner("wi"))
        hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        outer = Dense(d_model, ("mlp", "embed"), self.use_bias, self.dtype, self.wo_init, name="wo")
        return self._hooked("wo", hidden, outer(hidden))

    def _hooked(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return y if self.hooks is None else self.hooks.output(f"ffn.{name}", x, y)
