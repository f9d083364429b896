"""Layers small enough to compile in a second or two, for the tests of SMILE."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.core import layers
from jaxmodels.smile import Grid, MoeConfig, moe

D, F, TOKENS = 8, 12, 12
# A program here runs a few times on few numbers: compiling it is what takes the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def config(**changes: Any) -> MoeConfig:
    """2 nodes of 2 devices with 2 experts each; bi-level."""
    grid = changes.pop("grid", Grid(2, 2))
    sizes = {"num_experts": 2 * grid.size, "d_ff": F, "use_bias": True}
    return MoeConfig(grid=grid, **(sizes | changes))


def params(of: MoeConfig, seed: int = 0, d: int = D) -> dict[str, Any]:
    """Random parameters; routers large enough to have opinions."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    made: dict[str, Any] = {name: draw(*shape) for name, shape in of.router_shapes(d).items()}
    e, f = of.num_experts, of.d_ff
    experts = {"wi": draw(e, d, f) / 3, "wo": draw(e, f, d) / 3}
    if of.use_bias:
        experts |= {"bi": draw(e, f), "bo": draw(e, d)}
    return made | {"experts": experts}


def tokens(of: MoeConfig, seed: int = 1, count: int = TOKENS) -> np.ndarray:
    """[n, m, count, D]."""
    shape = (of.grid.nodes, of.grid.devices, count, D)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def start(module: nn.Module, *inputs: Any) -> Any:
    """Parameters of a module by NumPy: compiling an initialiser takes longer than a test's rest.

    Scales of norms are 1, biases 0, matrices normal with std 0.02.
    """
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "bias", "bi", "bo"):
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        return (0.02 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(params: Any, x: Any, of: MoeConfig, mask: Any = None, deterministic: bool = False) -> Any:
    """The layer, compiled; NumPy arrays, since every operation on others is compiled as well."""
    return jax.device_get(_run(params, x, of, mask, deterministic))


@functools.partial(jax.jit, static_argnums=(2, 4), compiler_options=QUICK)
def _run(params: Any, x: jax.Array, of: MoeConfig, mask: Any, deterministic: bool) -> Any:
    return moe.apply(params, x, of, mask, deterministic=deterministic)


def gradients(params: Any, x: Any, of: MoeConfig, mask: Any = None) -> Any:
    """(y, report), and gradients of sum(y sin(y)) and the losses with respect to all but masks."""
    return jax.device_get(_gradients(params, x, of, mask))


@functools.partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def _gradients(params: Any, x: jax.Array, of: MoeConfig, mask: Any) -> Any:

    def objective(params: Any, x: jax.Array) -> Any:
        y, report = moe.apply(params, x, of, mask, deterministic=False)
        return (y * jnp.sin(y)).sum() + moe.auxiliary_loss(report, of), (y, report)

    (_, found), grads = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)
    return found, grads


def dense(params: Any, x: np.ndarray, of: MoeConfig) -> np.ndarray:
    """gate * FFN of the chosen expert for tokens [T, D], by NumPy in float64 with loops."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    activation = layers.activation(of.activation)
    y = np.zeros(x.shape)
    for t, row in enumerate(np.asarray(x, np.float64)):
        if of.routing == "one_level":
            p = softmax(row @ wide["router"])
            expert, gate = int(p.argmax()), p.max()
        else:
            p = softmax(row @ wide["router_inter"])
            node = int(p.argmax())
            kernel = wide["router_intra"]
            q = softmax(row @ (kernel if kernel.ndim == 2 else kernel[node]))
            expert, gate = node * of.experts_per_node + int(q.argmax()), p.max() * q.max()
        own = {name: leaf[expert] for name, leaf in wide["experts"].items()}
        hidden = activation(jnp.asarray(row @ own["wi"] + own.get("bi", 0)))
        y[t] = gate * (np.asarray(hidden, np.float64) @ own["wo"] + own.get("bo", 0))
    return y


def softmax(x: np.ndarray) -> np.ndarray:
    """Of one row."""
    e = np.exp(x - x.max())
    return e / e.sum()
