"""The published sizes of VCC-T5: every preset's parameters and encoder FLOPs, without computing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import vcc_t5
from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.vcc import VccConfig, VccT5, compression, settings
from train.flops import count_flops

PARAMETERS = {
    "t5_base_hotpotqa": 222_903_552,
    "t5_large_qmsum": 737_668_096,
    "t5_3b_arxiv": 2_851_598_336,
    "t5_base_pretrain": 227_413_248,
    "t5_large_pretrain": 743_681_024,
    "t5_3b_pretrain": 2_857_611_264,
}
TFLOPS = {
    "t5_base_hotpotqa": 0.467,
    "t5_base_multi_news": 0.820,
    "t5_base_narrative_qa": 1.459,
    "t5_base_narrative_qa_32k_b32": 2.58,
    "t5_base_narrative_qa_64k_b64": 4.69,
    "t5_base_narrative_qa_128k": 11.7,
    "t5_large_narrative_qa": 4.25,
    "t5_3b_narrative_qa": 17.0,
}
ROWS = {
    "t5_base_pretrain": 1816,
    "t5_base_hotpotqa": 1396,
    "t5_base_multi_news": 1877,
    "t5_base_narrative_qa": 2419,
    "t5_base_narrative_qa_32k_b32": 2791,
    "t5_base_narrative_qa_64k_b64": 2977,
    "t5_base_narrative_qa_128k": 9587,
}


def sizes(preset: str) -> tuple[int, Any, VccConfig]:
    """Tokens, trunk and compression of a preset."""
    config = vcc_t5.get_config(preset)
    vcc = settings.vcc_config(config.model)
    return config.data.length, settings.t5_config(config.model), vcc


def formula(preset: str) -> int:
    """Forward FLOPs of the encoder for one sequence, by the cost model of the paper's layers."""
    n, trunk, vcc = sizes(preset)
    d, inner, p = trunk.d_model, trunk.num_heads * trunk.head_dim, vcc.num_vip
    m = (n - p) // vcc.block_size

    def layer(rows: int, keys: int) -> int:
        return 8 * rows * d * inner + 4 * rows * keys * inner + 4 * rows * d * trunk.d_ff

    r = vcc.compressed_length(n)
    select = 2 * p * d * inner + 2 * m * d * inner + 2 * p * m * inner
    costs = {"local": layer(n, vcc.segment_length), "vcc": layer(r, r) + select}
    return sum(costs[kind] for kind in vcc.kinds)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    _, trunk, vcc = sizes(preset)
    init = functools.partial(settings.init, settings.make_t5(trunk, vcc))
    shapes = partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))
    assert param_tree.count(shapes) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", TFLOPS)
def test_formula_gives_the_published_flops(preset: str) -> None:
    assert formula(preset) == pytest.approx(TFLOPS[preset] * 1e12, rel=0.005)


def traced(preset: str) -> int:
    """FLOPs of the traced encoder; of a length that is not cut by hand."""
    n, trunk, vcc = sizes(preset)
    changes = {"implementation": "xla", "remat": "none"}
    model = VccT5(
        type(trunk)(**{**trunk.__dict__, **changes}),
        type(vcc)(**{**vcc.__dict__, "layout": "gather"}),
    )
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    params = jax.eval_shape(functools.partial(settings.init, model), jax.random.key(0))

    def run(params: Any, ids: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids, ids, vip_mask=ids, method="encode")

    return count_flops(jax.make_jaxpr(run)(partitioning.unbox(params), ids))


@pytest.mark.parametrize("preset", ["t5_base_hotpotqa", "t5_3b_narrative_qa"])
def test_flops_of_the_traced_encoder_are_those_of_the_formula(preset: str) -> None:
    assert traced(preset) == pytest.approx(formula(preset), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in vcc_t5.PRESETS if name != "quickstart"])
def test_flops_of_every_traced_preset_are_those_of_the_formula(preset: str) -> None:
    assert traced(preset) == pytest.approx(formula(preset), rel=0.02)


@pytest.mark.parametrize("preset", ROWS)
def test_presets_run_on_the_published_number_of_rows(preset: str) -> None:
    n, _, vcc = sizes(preset)
    assert vcc.compressed_length(n) == ROWS[preset]


@pytest.mark.parametrize("preset", [name for name in vcc_t5.PRESETS if name.startswith("t5_")])
def test_every_preset_needs_no_padding(preset: str) -> None:
    n, trunk, vcc = sizes(preset)
    assert compression.padded_length(n, vcc.num_vip, vcc.block_size) == n
    assert n % vcc.segment_length == 0
    kinds = ("local",) * (trunk.num_layers // 4 if trunk.num_layers == 24 else 4)
    assert vcc.kinds == (*kinds, *("vcc",) * (trunk.num_layers - len(kinds)))
