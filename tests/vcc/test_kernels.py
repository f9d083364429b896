"""VCC layers by the kernels: the numbers of plain JAX, forward and backward, in every family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import attention, blocks
from jaxmodels.trunks import bert
from jaxmodels.vcc import compression, kernels
from jaxmodels.vcc.layer import RelativePositions, VccLayer, run_vcc_layers
from tests.vcc import small, small_t5

# The narrowest that the kernels take: one head, blocks of eight tokens, 128 wide.
SIZES = {"d_model": 128, "num_layers": 2, "num_heads": 1, "d_ff": 16}
ROBERTA = small.trunk(**SIZES)
T5 = dataclasses.replace(small_t5.RELU, head_dim=64, **SIZES)


def stack(
    config: Any, choice: str, params: Any, x: Any, mask: Any, vip: Any, rng: Any = None, **changes
) -> Any:
    """Enters, runs two layers and leaves; what was opened comes along."""
    vcc = small.vcc(("vcc",) * 2, num_vip=8, block_size=8, kernels=choice, **changes)
    layer = config.make_layer(cls=VccLayer, vcc=vcc)
    relative, places = None, None
    if not isinstance(config, bert.BertConfig):
        relative = RelativePositions(params["relative_bias"], config.make_bias())
        places = jnp.broadcast_to(jnp.arange(x.shape[1]), mask.shape)
    run = kernels.blocks(choice, 8, x.shape[-1])
    state, layout = compression.enter(x, mask, vip, 8, 8, places, run.enter)
    state, opened = run_vcc_layers(
        *(layer, params["layers"], state, layout, rng, config.remat, relative)
    )
    return compression.leave(state, layout, run.leave), opened["fine_blocks"]


def parameters(config: Any) -> Any:
    init = blocks.stacked_init(config.make_layer(), 2, 128)
    table = {"embedding": 0.5 * jax.random.normal(jax.random.key(0), (16, 1))}
    return {"layers": small.drawn(init, size=0.1, spread=True), "relative_bias": table}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "changes"),
    [(ROBERTA, {"layout": "gather"}), (dataclasses.replace(T5, remat="full"), {})],
    ids=["roberta, gather", "t5, static, recomputed"],
)
def test_kernels_give_values_and_gradients_of_plain_layers(config: Any, changes: dict) -> None:
    given = small.states(1, 40, 37, width=128)
    params = parameters(config)

    def both(choice: str) -> Any:
        @functools.partial(jax.jit, compiler_options=small_t5.QUICK)
        def run(params: Any, x: jax.Array) -> Any:
            def loss(params: Any, x: jax.Array) -> Any:
                y, fine = stack(config, choice, params, x, *given[1:], **changes)
                return jnp.sin(3 * y).sum(), (y, fine)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

        return run(params, given[0])

    (found, (y, fine)), bar = both("interpret")
    (expected, (y_plain, fine_plain)), bar_plain = both("xla")
    np.testing.assert_array_equal(fine, fine_plain)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(y, y_plain, rtol=0, atol=2e-5 * float(jnp.abs(y_plain).max()))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(bar_plain))
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(b) for b in (bar, bar_plain)), strict=True)
    for (path, have), (_, want) in pairs:
        size = max(float(jnp.abs(want).max()), 1e-3 * largest)  # key biases have none
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * size, err_msg=str(path))


def test_on_a_cpu_the_kernels_stand_aside() -> None:
    assert kernels.blocks("auto", 8, 128) == kernels.Blocks() == kernels.blocks("xla", 8, 128)
    assert not kernels.attends("auto", None, False)
    with pytest.raises(ValueError, match="kernels for TPU and GPU, and this is traced for 'cpu'"):
        kernels.blocks("pallas", 8, 128)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_platform_that_is_traced_for_chooses(platform: str, monkeypatch) -> None:
    monkeypatch.setattr(attention, "platform", lambda: platform)
    assert kernels.blocks("auto", 8, 128) == kernels.KernelBlocks(None)
    assert kernels.blocks("pallas", 8, 128) == kernels.KernelBlocks(platform)
    assert kernels.blocks("xla", 8, 128) == kernels.Blocks()
    assert kernels.attends("auto", None, False) and kernels.attends("pallas", None, False)
    assert not kernels.attends("xla", None, False)
    # Dropped weights, or an attention that the trunk names, are no kernel's.
    assert not kernels.attends("auto", None, True) and not kernels.attends("auto", "xla", False)
    with pytest.raises(ValueError, match="attention_dropout_rate to 0"):
        kernels.attends("pallas", None, True)
    with pytest.raises(ValueError, match="model.attention='chunked': one attention is wanted"):
        kernels.attends("pallas", "chunked", False)
    with pytest.raises(ValueError, match="block_size=300 tokens of width model.d_model=96"):
        kernels.blocks("pallas", 300, 96)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="model.kernels='triton': use one of auto, pallas, xla"):
        small.vcc(kernels="triton")


def test_dropped_attention_weights_take_the_plain_attention() -> None:
    """The program has then the kernels of the bank alone: their interpreter has no [r, r] array."""
    given = small.states(1, 40, 37, width=128)
    config = dataclasses.replace(ROBERTA, attention_dropout_rate=0.1)
    calls = []
    for rng in (None, jax.random.key(0)):
        run = functools.partial(stack, config, "interpret", rng=rng)
        text = str(jax.make_jaxpr(lambda *a, run=run: run(parameters(config), *a))(*given))
        calls.append(text.count("pallas_call"))
    assert calls[1] == calls[0] - 1 > 0
