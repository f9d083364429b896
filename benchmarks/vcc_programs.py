"""The programs of `vcc_length`: forward and backward of one layer or of an encoder.

The backward pass takes gradients of parameters and inputs, as in the middle of training; dropout
and exploration are off, so that the dense side may use its memory-lean attention. Inputs are
random: no cost here depends on values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import vcc_cost_model
from configs import vcc as vcc_configs
from configs import vcc_t5 as vcc_t5_configs
from jaxmodels.core import attention, partitioning
from jaxmodels.trunks.bert import BertConfig
from jaxmodels.trunks.t5 import T5Config
from jaxmodels.vcc import compression, encoder, settings
from jaxmodels.vcc import layer as vcc_layer
from jaxmodels.vcc.baseline_attentions import PATTERNS
from jaxmodels.vcc.baseline_attentions.sparse import SparseLayer, SparseStack, SparseT5Stack
from jaxmodels.vcc.encoder import VccConfig

Trunk = BertConfig | T5Config
PARTS = {
    "layer": {"vcc": "VCC layer", "dense": "dense layer"},
    "encoder": {
        **{"vcc": "local + VCC", "dense": "local + dense", "all_dense": "dense only"},
        **{"window": "window", "longt5": "LongT5", "bigbird": "BigBird"},
    },
}

# (p, b, k) published for longer documents; up to 4,096 tokens the preset's own hold.
LONG_DOCUMENTS = {
    8192: (16, 16, 90),
    16384: (48, 16, 90),
    32768: (64, 32, 55),
    65536: (64, 64, 30),
    131072: (48, 16, 90),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One side at one length.

    Attributes:
      rows: rows that its VCC layers (else: its layers) run on.
      vcc: how it compresses.
      forward: (params, inputs, *masks) -> outputs of the structure of inputs.
      shapes: of the arguments of `forward`.
      formula: forward FLOPs by `vcc_cost_model`.
    """

    rows: int
    vcc: VccConfig
    forward: Callable[..., Any]
    shapes: tuple[Any, ...]
    formula: int

    def step(self, params: Any, x: Any, *masks: Any) -> Any:
        """Runs forward and backward; returns gradients of params and x."""
        _, pull = jax.vjp(lambda params, x: self.forward(params, x, *masks), params, x)
        return pull(x)

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """Returns arrays for `forward` and `step`: small random numbers, masks of ones."""
        params, x, *masks = self.shapes
        rng = np.random.default_rng(seed)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _parameter(rng, path[-1].key, leaf), params
        )
        x = jax.tree.map(lambda leaf: _normal(rng, leaf.shape, 1.0), x)
        return params, x, *(jax.tree.map(_mask, mask) for mask in masks)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> jax.Array:
    """Normal numbers; 65,537 of them over and over, which is quicker and does no harm here."""
    return jnp.asarray(np.resize(scale * rng.standard_normal(65537, np.float32), shape))


def _parameter(rng: np.random.Generator, name: str, leaf: Any) -> jax.Array:
    if name == "kernel":
        return _normal(rng, leaf.shape, 0.02)
    return jnp.full(leaf.shape, 1.0 if name == "scale" else 0.0, leaf.dtype)


def _mask(leaf: Any) -> jax.Array:
    """Ones, or for integers the order of rows 0, 1, 2, ..."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.broadcast_to(jnp.arange(leaf.shape[-1], dtype=leaf.dtype), leaf.shape)
    return jnp.ones(leaf.shape, leaf.dtype)


def sizes(preset: str, n: int) -> tuple[Trunk, VccConfig]:
    """Returns the sizes of a preset for documents of `n` tokens.

    The quickstarts keep their (p, b, k) at every length; other presets take `LONG_DOCUMENTS`.

    Args:
      preset: of configs/vcc.py; t5_* of configs/vcc_t5.py, t5_quickstart is its quickstart.
      n: tokens.
    """
    t5, own = preset.startswith("t5_"), preset
    if preset == "t5_quickstart":
        own = "quickstart"
    model = (vcc_t5_configs if t5 else vcc_configs).get_config(own).model
    trunk = settings.t5_config(model) if t5 else settings.trunk_config(model)
    vcc = settings.vcc_config(model)
    # One dtype for both sides, whatever the preset trains in.
    trunk = dataclasses.replace(trunk, dtype=jnp.float32, remat="none")
    if own != "quickstart" and n in LONG_DOCUMENTS:
        p, b, k = LONG_DOCUMENTS[n]
        vcc = dataclasses.replace(vcc, num_vip=p, block_size=b, num_fine_blocks=k)
    return trunk, vcc


def make_program(part: str, side: str, trunk: Trunk, vcc: VccConfig, n: int) -> Program:
    """Returns a side of a part ("layer", "encoder") at `n` tokens, batch 1.

    Raises:
      ValueError: a part or side that is not in `PARTS`.
    """
    if side not in PARTS.get(part, {}):
        raise ValueError(f"part {part!r}, side {side!r}: use one of {PARTS}.")
    if side in PATTERNS:
        return _sparse_encoder(side, trunk, vcc, n)
    if part == "encoder":
        return _encoder(side, trunk, vcc, n)
    if isinstance(trunk, T5Config):
        raise ValueError("one layer is measured on RoBERTa's presets: of T5, choose the encoder.")
    return _vcc_layer(trunk, vcc, n) if side == "vcc" else _dense_layer(trunk, vcc, n)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.lru_cache
def _parameter_shapes(module: Any, *shapes: jax.ShapeDtypeStruct) -> Any:
    init = functools.partial(module.init, jax.random.key(0))
    return partitioning.unbox(jax.eval_shape(init, *shapes))["params"]


def _dense_layer(trunk: BertConfig, vcc: VccConfig, n: int) -> Program:
    layer = trunk.make_layer()

    def forward(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        bias = attention.key_mask_bias(mask)[:, None, None, :]
        return layer.apply({"params": params}, x, bias)

    shapes = (_parameter_shapes(layer, _shape(1, 1, trunk.d_model)), _shape(1, n, trunk.d_model))
    formula = vcc_cost_model.dense_flops(n, trunk)
    return Program(n, vcc, forward, (*shapes, _shape(1, n)), formula)


def _vcc_layer(trunk: BertConfig, vcc: VccConfig, n: int) -> Program:
    """Selects, refines, encodes and writes back; the states enter and leave compressed."""
    layer = trunk.make_layer(vcc_layer.VccLayer, vcc=vcc)

    def forward(params: Any, state: compression.State, layout: compression.Layout) -> Any:
        return vcc_layer.run_vcc_layer(layer, params, state, layout)[0]

    params = _parameter_shapes(trunk.make_layer(), _shape(1, 1, trunk.d_model))
    p, b, m, d = vcc.num_vip, vcc.block_size, vcc_cost_model.num_blocks(n, vcc), trunk.d_model
    state = compression.State(_shape(1, p, d), _shape(1, m, d), _shape(1, m, b, d))
    layout = compression.Layout(
        _shape(1, p + m * b, dtype=jnp.int32), _shape(1, p), _shape(1, p), _shape(1, m, b)
    )
    formula = vcc_cost_model.vcc_flops(n, trunk, vcc)
    return Program(vcc_cost_model.rows_run(n, vcc), vcc, forward, (params, state, layout), formula)


def _sparse_encoder(side: str, trunk: Trunk, vcc: VccConfig, n: int) -> Program:
    """A baseline in all layers, with its published sizes."""
    pattern = PATTERNS[side]
    if isinstance(trunk, T5Config):
        layer = trunk.make_layer(cls=SparseLayer, pattern=pattern)
        module = SparseT5Stack(
            layer=layer, num_layers=trunk.num_layers, final_norm="rms", bias=trunk.make_bias()
        )
    else:
        layer = trunk.make_layer(SparseLayer, pattern=pattern)
        module = SparseStack(layer, trunk.num_layers, final_norm="layer")

    def run(module: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return module(x, module.prepare(mask), True)

    def forward(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x, mask, method=run)

    shapes = _shape(1, n, trunk.d_model), _shape(1, n)
    init = functools.partial(module.init, jax.random.key(0), method=run)
    params = partitioning.unbox(jax.eval_shape(init, *shapes))["params"]
    formula = trunk.num_layers * vcc_cost_model.sparse_flops(n, trunk, pattern)
    return Program(n, vcc, forward, (params, *shapes), formula)


def _encoder(side: str, trunk: Trunk, vcc: VccConfig, n: int) -> Program:
    kinds = {
        "vcc": vcc.kinds,
        "dense": tuple("dense" if kind == "vcc" else kind for kind in vcc.kinds),
        "all_dense": ("dense",) * len(vcc.kinds),
    }[side]
    vcc = dataclasses.replace(vcc, kinds=kinds)
    more = {}
    if isinstance(trunk, T5Config):
        more = {"bias": trunk.make_bias(), "mask_value": attention.HIDDEN, "drop_weights": False}
    module = encoder.VccEncoder(trunk, vcc, **more)

    def forward(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        vip_mask = jnp.broadcast_to(jnp.arange(n) < vcc.num_vip, mask.shape)
        return module.apply({"params": params}, x, mask, vip_mask)[0]

    mask = _shape(1, 2 * vcc.num_vip)
    params = _parameter_shapes(module, _shape(*mask.shape, trunk.d_model), mask, mask)
    rows = vcc_cost_model.rows_run(n, vcc) if side == "vcc" else n
    formula = vcc_cost_model.encoder_flops(n, trunk, vcc)
    return Program(rows, vcc, forward, (params, _shape(1, n, trunk.d_model), _shape(1, n)), formula)
