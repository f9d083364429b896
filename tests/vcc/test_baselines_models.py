"""RoBERTa and T5 with sparse encoders: one flag, the trunk's own parameters, hooks and costs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import vcc_cost_model
from jaxmodels.core import hooks, partitioning
from jaxmodels.trunks import bert, t5
from jaxmodels.vcc.baseline_attentions import (
    PATTERNS,
    BigBird,
    LongT5,
    SparsePattern,
    SparseRoberta,
    SparseT5,
    Window,
    sparse_pattern,
)
from tests.trunks.hook_cases import Delta, Prefix
from tests.vcc import small, small_t5
from train.flops import count_flops

T5 = dataclasses.replace(small_t5.RELU, num_layers=2, num_decoder_layers=1)
ROBERTA = small.trunk(num_layers=2, norm_order="post")
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 50, (2, 19)), jnp.int32)
MASK = jnp.asarray(np.arange(19) < np.array([[19], [14]]), jnp.int32)
VIP = jnp.asarray(np.isin(np.arange(19), (2, 9))[None].repeat(2, 0), jnp.int32)
SMALL = {
    "window": {"window": 6, "num_global": 2, "global_tokens": "vip"},
    "longt5": {"radius": 3, "global_block_size": 4},
    "longt5_local": {"radius": 3},
    "bigbird": {"block_size": 3, "num_random_blocks": 0},
}
EVERYTHING = [Window(40, 0), LongT5(20, 0), BigBird(8, 1)]  # patterns that see it here


def encode(model: Any, params: Any, **more: Any) -> jax.Array:
    """The encoder's states of the ids above."""

    def run(params: Any, ids: jax.Array, mask: jax.Array) -> Any:
        if isinstance(model, t5.T5):
            more["method"] = "encode"
        found = model.apply({"params": params}, ids, mask, **more)
        return found[0] if isinstance(found, tuple) else found

    return jax.jit(run, compiler_options=small_t5.QUICK)(params, IDS, MASK)


def drawn(model: Any, size: float = 0.3) -> Any:
    vip = {"vip_mask": VIP} if isinstance(model, SparseT5 | SparseRoberta) else {}
    return small.drawn(lambda rng: model.init(rng, IDS, MASK, **vip), size=size)["params"]


def compare(found: jax.Array, wanted: jax.Array) -> None:
    real = np.asarray(MASK) > 0
    np.testing.assert_allclose(found[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    found = {}
    for name, model in (("t5", t5.T5(T5)), ("roberta", bert.BertModel(ROBERTA))):
        params = drawn(model)
        found[name] = (params, encode(model, params))
    return found


@pytest.mark.parametrize("pattern", EVERYTHING, ids=lambda p: type(p).__name__)
def test_t5_with_a_pattern_that_sees_everything_is_t5(dense: Any, pattern: SparsePattern) -> None:
    params, wanted = dense["t5"]
    compare(encode(SparseT5(T5, pattern), params), wanted)


def test_roberta_with_a_window_over_everything_is_roberta(dense: Any) -> None:
    params, wanted = dense["roberta"]
    compare(encode(SparseRoberta(ROBERTA, Window(40, 2)), params), wanted)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_baseline_has_the_parameters_of_its_trunk(name: str) -> None:
    """LongT5 alone adds a norm a layer, and T5's a second table."""

    def shapes(model: Any, **more: Any) -> dict[str, Any]:
        init = jax.eval_shape(lambda rng: model.init(rng, IDS, MASK, **more), jax.random.key(0))
        flat = jax.tree_util.tree_leaves_with_path(partitioning.unbox(init)["params"])
        return {jax.tree_util.keystr(k, simple=True, separator="/"): v.shape for k, v in flat}

    pattern = sparse_pattern(name)
    extra = {"encoder/layers/global_norm/scale": (2, 16)} if name == "longt5" else {}
    table = {"encoder/global_relative_bias/embedding": (16, 2)} if name == "longt5" else {}
    found = shapes(SparseT5(T5, pattern), vip_mask=VIP)
    assert found == shapes(t5.T5(T5)) | extra | table
    found = shapes(SparseRoberta(ROBERTA, pattern), vip_mask=VIP)
    assert found == shapes(bert.BertModel(ROBERTA)) | extra


@pytest.mark.parametrize("name", ["window", "longt5", "bigbird"])
def test_gradients_reach_every_parameter_and_padding_reaches_none(name: str) -> None:
    model = SparseT5(T5, sparse_pattern(name, **SMALL[name]))
    params = drawn(model)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        states = model.apply(
            {"params": params}, None, MASK, inputs_embeds=x, vip_mask=VIP, method="encode"
        )
        weight = jnp.sin(jnp.arange(states.size).reshape(states.shape))
        return (states * weight * MASK[..., None]).sum()

    x = params["shared"]["embedding"][IDS]
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=small_t5.QUICK)
    found, input_found = grad(params, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found["encoder"]):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0, path
    reached = jnp.abs(input_found).max(-1) > 0
    np.testing.assert_array_equal(reached, MASK > 0)


def test_hooks_work_in_sparse_layers_as_in_dense_ones() -> None:
    """A weight delta and a prefix in layer 1; the prefix is read by every query."""
    both = hooks.Chain((Delta(features=12), Prefix(length=3)))
    config = dataclasses.replace(T5, encoder_hooks=(hooks.LayerHooks(both, start=1),))
    params = drawn(t5.T5(config))
    wanted = encode(t5.T5(config), params)
    compare(encode(SparseT5(config, Window(40, 0)), params), wanted)
    without = encode(SparseT5(T5, Window(40, 0)), params)
    assert jnp.abs(wanted - without).max() > 1e-2


def test_dropout_falls_on_the_weights_of_all_chunks() -> None:
    """Weights alone are dropped: equal values would otherwise mix to the same."""
    config = dataclasses.replace(ROBERTA, attention_dropout_rate=0.5)
    model = SparseRoberta(config, Window(6, 1))
    params = drawn(model)

    def run(params: Any, rng: jax.Array) -> jax.Array:
        return model.apply({"params": params}, IDS, MASK, deterministic=False,
                           rngs={"dropout": rng})[0]  # fmt: skip

    run = jax.jit(run, compiler_options=small_t5.QUICK)
    one, two = run(params, jax.random.key(0)), run(params, jax.random.key(1))
    moved = jnp.abs(one - two).max(-1) > 1e-4
    assert jnp.isfinite(one).all() and (moved | (MASK == 0)).all()


def test_half_precision_stays_near() -> None:
    model = SparseT5(T5, LongT5(3, 4))
    params = drawn(model, size=0.1)
    half = SparseT5(dataclasses.replace(T5, dtype=jnp.bfloat16), LongT5(3, 4))
    found, wanted = encode(half, params), encode(model, params)
    assert found.dtype == jnp.float32
    real = np.asarray(MASK) > 0
    assert np.abs(found - wanted)[real].max() < 0.05 * np.abs(wanted)[real].max()


@pytest.mark.slow
def test_the_decoder_starts_from_the_sparse_encoder() -> None:
    """`start`, of generation, gives the logits of the whole model for the start token."""
    model = SparseT5(T5, Window(6, 2, "vip"))
    params = drawn(model)
    apply = jax.jit(
        lambda params: model.apply({"params": params}, IDS, MASK, vip_mask=VIP),
        compiler_options=small_t5.QUICK,
    )
    wanted = apply(params)[:, 0]

    def start(params: Any) -> jax.Array:
        return model.apply(
            {"params": params}, IDS, MASK, vip_mask=VIP, max_new_tokens=2, method="start"
        ).logits

    found = jax.jit(start, compiler_options=small_t5.QUICK)(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_program_does_not_grow_with_depth() -> None:
    def equations(depth: int) -> int:
        model = SparseT5(dataclasses.replace(T5, num_layers=depth), LongT5(3, 4))
        params = jax.eval_shape(lambda rng: model.init(rng, IDS, MASK), jax.random.key(0))
        params = partitioning.unbox(params)
        made = jax.make_jaxpr(lambda p: model.apply(p, IDS, MASK, method="encode"))(params)
        return len(made.jaxpr.eqns)

    assert equations(2) == equations(6)


def test_wrong_names_settings_and_missing_vips_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder='reformer': use one of window, longt5"):
        sparse_pattern("reformer")
    with pytest.raises(ValueError, match=r"'bigbird' has no setting \['window'\]"):
        sparse_pattern("bigbird", window=4)
    with pytest.raises(ValueError, match="window=5"):
        sparse_pattern("window", window=5)
    model = SparseT5(T5, Window(6, 2, "vip"))
    with pytest.raises(ValueError, match="needs a vip_mask"):
        jax.eval_shape(lambda rng: model.init(rng, IDS, MASK), jax.random.key(0))


COSTS = [
    (Window(32, 3), 512),
    (Window(32, 0), 500),
    (LongT5(15, 8), 512),
    (LongT5(15, 0), 512),
    (BigBird(16, 3), 512),
    (BigBird(64, 3), 512),
]


@pytest.mark.parametrize(("pattern", "n"), COSTS, ids=str)
def test_flops_of_a_baseline_are_those_of_the_cost_model(pattern: SparsePattern, n: int) -> None:
    config = dataclasses.replace(T5, gated=True, activation="gelu_new")
    model = SparseT5(config, pattern)
    ids = jnp.zeros((1, n), jnp.int32)
    params = jax.eval_shape(lambda rng: model.init(rng, IDS, MASK), jax.random.key(0))
    params = partitioning.unbox(params)
    found = count_flops(jax.make_jaxpr(lambda p: model.apply(p, ids, method="encode"))(params))
    wanted = 2 * vcc_cost_model.sparse_flops(n, config, pattern)
    assert found == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("pattern", "n", "teraflops"),
    [(LongT5(), n, t) for n, t in ((4096, 0.80), (16384, 3.66), (131072, 63.9))]
    + [(Window(1024, 0), n, t) for n, t in ((4096, 0.85), (16384, 3.40), (131072, 27.2))]
    + [(Window(512, 0), 8192, 1.55)],
    ids=str,
)
def test_costs_are_those_published(pattern: SparsePattern, n: int, teraflops: float) -> None:
    found = 12 * vcc_cost_model.sparse_flops(n, t5.SIZES["t5_base"], pattern, executed=False)
    assert found / 1e12 == pytest.approx(teraflops, rel=0.01)
