"""Sizes, inputs and parameters small enough to compile in a second, for the tests of VCC."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core import blocks, partitioning
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import bert
from jaxmodels.vcc import VccConfig, compression
from jaxmodels.vcc import layer as layer_lib

enter = jax.jit(compression.enter, static_argnums=(3, 4))
leave = jax.jit(compression.leave)
TRUNK = bert.BertConfig(
    vocab_size=50,
    d_model=16,
    num_layers=3,
    num_heads=2,
    d_ff=32,
    max_positions=64,
    num_token_types=2,
    norm_order="pre",
)


def trunk(**changes: Any) -> bert.BertConfig:
    return dataclasses.replace(TRUNK, **changes)


def vcc(kinds: tuple[str, ...] = ("vcc",) * 3, **changes: Any) -> VccConfig:
    sizes = {"num_vip": 4, "block_size": 4, "num_fine_blocks": 2, "segment_length": 8}
    return VccConfig(kinds=kinds, **(sizes | changes))


def drawn(init: Callable[..., Any], *args: Any, size: float, spread: bool = False) -> Any:
    """Parameters of `init`'s shapes, drawn in numpy, which compiles nothing.

    Kernels and tables are normal of size `size`; biases 0 and scales 1, or near that if `spread`.
    """
    shapes = partitioning.unbox(jax.eval_shape(init, jax.random.key(0), *args))
    rng = np.random.default_rng(0)

    def one(path: str, leaf: Any) -> jax.Array:
        noise = size * rng.normal(size=leaf.shape)
        vector = path.endswith(("/bias", "/scale"))
        centre = float(path.endswith("/scale"))
        return jnp.asarray(centre + noise * (spread or not vector), leaf.dtype)

    return param_tree.label(shapes, one)


def layer_params(config: bert.BertConfig, gain: float = 8.0) -> Any:
    """Stacked parameters; kernels `gain` times the usual start, so that attention is not flat."""
    init = blocks.stacked_init(config.make_layer(), config.num_layers, config.d_model)
    return drawn(init, size=0.02 * gain)


def states(
    batch: int = 2, n: int = 28, real: int | None = None, vips: int = 3, width: int = 16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings [B, n, d], mask and VIP mask [B, n]: the first `real` tokens count."""
    x = jax.random.normal(jax.random.key(n), (batch, n, width))
    mask = np.zeros((batch, n), np.int32)
    mask[:, : n if real is None else real] = 1
    vip = np.zeros((batch, n), np.int32)
    for row in range(batch):  # spread, and different in each example
        vip[row, (np.arange(vips) * 5 + row) % mask[row].sum()] = 1
    return x, jnp.asarray(mask), jnp.asarray(vip)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layers(
    config: bert.BertConfig,
    settings: VccConfig,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    rng: jax.Array | None = None,
) -> tuple[compression.State, compression.Selection]:
    """Runs a stack of VCC layers on a compressed state; selections stacked by layer."""
    layer = config.make_layer(layer_lib.VccLayer, vcc=settings)

    def body(one: Any, state: compression.State, key: jax.Array | None) -> tuple[Any, Any]:
        return layer_lib.run_vcc_layer(layer, one, state, layout, key, config.remat)

    return blocks.scan_layers(body, params, state, rng)
