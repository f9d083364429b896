"""T5 models small enough to compile in a second, with inputs, for the tests of VCC-T5."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.trunks import t5
from jaxmodels.vcc import VccConfig, VccT5, compression
from jaxmodels.vcc.layer import RelativePositions, VccLayer, run_vcc_layer
from tests.vcc import small

# Compiled without optimisation, which halves the time of the tests and changes no number.
QUICK = {"xla_backend_optimization_level": 0}
RELU = t5.T5Config(
    vocab_size=50,
    d_model=16,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=2,
    head_dim=6,
    d_ff=32,
    num_buckets=16,
    max_distance=40,
    dropout_rate=0.0,
)
GATED = dataclasses.replace(RELU, activation="gelu_new", gated=True, tied_head=False)


def inputs(
    batch: int = 2, n: int = 28, real: int | None = None, vips: int = 3
) -> dict[str, jax.Array]:
    """Ids, mask and VIP mask [B, n]: the first `real` tokens count."""
    _, mask, vip = small.states(batch, n, real, vips)
    ids = np.random.default_rng(n).integers(2, 50, size=(batch, n))
    return {"input_ids": jnp.asarray(ids), "attention_mask": mask, "vip_mask": vip}


@functools.cache
def params(config: t5.T5Config, size: float = 0.3) -> Any:
    """Parameters of T5 and VCC-T5 alike; large, so that attention is not flat."""
    return small.drawn(t5.T5(config).init, jnp.zeros((1, 2), jnp.int32), size=size)["params"]


def states(
    config: t5.T5Config,
    settings: VccConfig | None,
    params: Any,
    given: dict[str, jax.Array],
    rng: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """What the encoder returns, and what it opened; T5's own where `settings` is None."""
    more = {"deterministic": rng is None}
    rngs = None if rng is None else {"dropout": rng}
    if settings is None:
        plain = {k: v for k, v in given.items() if k != "vip_mask"}
        model = t5.T5(config)
        return model.apply({"params": params}, **plain, **more, rngs=rngs, method="encode"), {}
    model = VccT5(config, settings)
    return model.apply({"params": params}, **given, **more, rngs=rngs, method="encode_traced")


encode = jax.jit(states, static_argnums=(0, 1), compiler_options=QUICK)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def run_layers(
    config: t5.T5Config, settings: VccConfig, params: Any, x: Any, mask: Any, vip: Any
) -> tuple[list[compression.State], list[compression.Selection], compression.Layout]:
    """Runs VCC layers one after the other; every state, the first included."""
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), mask.shape)
    state, layout = compression.enter(x, mask, vip, settings.num_vip, settings.block_size, places)
    relative = RelativePositions(params["encoder"]["relative_bias"], config.make_bias())
    layer = config.make_layer(cls=VccLayer, vcc=settings)
    states, selections = [state], []
    for i in range(config.num_layers):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params["encoder"]["layers"])
        state, chosen = run_vcc_layer(layer, one, state, layout, relative=relative)
        states.append(state)
        selections.append(chosen)
    return states, selections, layout
