"""The layer in trunks: as a hook, in the encoder, and at the sizes of the paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import smile as presets
from jaxmodels.core import hooks
from jaxmodels.core import params as param_tree
from jaxmodels.smile import Grid, MoeConfig, MoeHook, MoeMlp, moe, sizes, task
from jaxmodels.smile.model import SmileBert, SmileConfig
from jaxmodels.trunks import bert
from tests.smile import small

TRUNK = bert.BertConfig(
    vocab_size=40,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_ff=24,
    max_positions=16,
    norm_order="pre",
)
quick = functools.partial(jax.jit, compiler_options=small.QUICK)
EXPERTS = MoeConfig(num_experts=4, d_ff=24, grid=Grid(2, 2), eval_capacity_factor=8.0)


@functools.cache
def module_and_params(experts: MoeConfig | None = EXPERTS):
    module = SmileBert(SmileConfig(TRUNK, experts))
    ids = np.zeros((1, 2), np.int32)
    return module, small.start(module, ids, ids)


def batch(rows: int = 4, length: int = 6):
    ids = np.random.default_rng(0).integers(5, 40, (rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[:, -2:] = 0
    return ids, mask


@pytest.mark.parametrize(
    "preset", [name for name in presets.PRESETS if name.startswith(("smile", "switch", "dense"))]
)
def test_presets_hold_the_parameters_that_the_paper_counts(preset: str) -> None:
    config = presets.get_config(preset)
    module = SmileBert(task.model_config(config))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda i: module.init(jax.random.key(0), i, i)["params"], ids)
    wanted = sizes.SIZES[preset.replace("switch", "smile")].counts(config.moe.routing)
    leaves = param_tree.flatten(nn.unbox(shapes))
    assert param_tree.count(leaves) == wanted["total"]
    experts = {path: leaf for path, leaf in leaves.items() if "/experts/" in path}
    assert param_tree.count(experts) == wanted["experts"]
    routers = {path: leaf for path, leaf in leaves.items() if "/router" in path}
    assert param_tree.count(routers) == wanted["router_total"]


def test_two_routers_are_a_fifth_of_one() -> None:
    model = sizes.SIZES["smile_3_7b"]
    assert model.router_flops("one_level") == 2 * 768 * 128
    assert model.router_flops("bi_level") == 2 * 768 * (16 + 8)


def test_padding_is_neither_routed_nor_seen() -> None:
    module, params = module_and_params()
    ids, mask = batch()
    run = quick(lambda ids: module.apply({"params": params}, ids, mask))
    (x, reports), (y, _) = jax.device_get([run(ids), run(np.where(mask == 1, ids, 7))])
    np.testing.assert_allclose(x[:, :4], y[:, :4], atol=1e-6)
    assert reports.load.shape == (1, 2, 2, 1) and reports.load.sum() == mask.sum()


def test_the_program_does_not_grow_with_depth() -> None:
    def equations(num_layers: int) -> int:
        trunk = dataclasses.replace(TRUNK, num_layers=num_layers)
        module = SmileBert(SmileConfig(trunk, EXPERTS))
        ids, mask = batch()
        traced = jax.make_jaxpr(lambda: module.init_with_output(jax.random.key(0), ids, mask))()
        return len(str(traced).splitlines())

    assert equations(2) == equations(8)


def test_an_odd_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers=3.*even"):
        SmileConfig(dataclasses.replace(TRUNK, num_layers=3), EXPERTS)


def test_a_hook_with_one_expert_is_the_trunks_own_feed_forward() -> None:
    ids, mask = batch()
    only = MoeConfig(num_experts=1, d_ff=24, activation="gelu", routing="one_level")
    hooked = dataclasses.replace(TRUNK, layer_hooks=(hooks.LayerHooks(MoeHook(only), start=1),))
    plain, model = bert.BertModel(TRUNK), bert.BertModel(hooked)
    own = small.start(plain, ids)
    ffn = jax.tree.map(lambda leaf: leaf[1:], own["encoder"]["layers"]["ffn"])
    experts = {
        "wi": ffn["wi"]["kernel"][:, None],
        "bi": ffn["wi"]["bias"][:, None],
        "wo": ffn["wo"]["kernel"][:, None],
        "bo": ffn["wo"]["bias"][:, None],
    }
    router = np.ones((1, TRUNK.d_model, 1), np.float32)
    added = {"hooks_1": {"moe": {"router": router, "experts": experts}}}
    params = {**own, "encoder": own["encoder"] | added}
    run = quick(lambda p: model.apply({"params": p}, ids, mask, mutable=["intermediates"]))
    y, sown = jax.device_get(run(params))
    wanted = quick(lambda p: plain.apply({"params": p}, ids, mask))(own)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    report = sown["intermediates"]["encoder"]["hooks_1"]["hooks"]["report"]
    assert report.load.shape == (1, 1, 1, 1) and report.load.sum() == ids.size


@pytest.fixture(scope="module")
def layer():
    config = small.config(capacity_factor=8.0, capacity_factor_intra=16.0, activation="gelu")
    return MoeMlp(config), small.params(config)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (1, 1)], ids=["even", "padded", "decoding"])
def test_any_batch_gives_the_dense_formula(layer, shape) -> None:
    module, params = layer
    x = np.random.default_rng(4).normal(size=(*shape, small.D)).astype(np.float32)
    y, report = jax.device_get(quick(lambda x: module.apply({"params": params}, x))(x))
    wanted = small.dense(params, x.reshape(-1, small.D), module.config).reshape(x.shape)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert report.tokens == report.load.sum() == shape[0] * shape[1]


def test_a_mask_of_another_shape_is_refused(layer) -> None:
    module, params = layer
    with pytest.raises(ValueError, match=r"\[batch, length\] are needed"):
        module.apply({"params": params}, jnp.zeros((2, 3, small.D)), jnp.ones((2, 4)))


def test_experts_start_alike_on_every_grid_and_apart_from_each_other() -> None:
    def experts(grid: Grid):
        module = MoeMlp(small.config(grid=grid, num_experts=8))
        made = quick(lambda: module.init(jax.random.key(3), jnp.zeros((1, 1, small.D))))()
        return np.asarray(nn.unbox(made["params"])["experts"]["wi"])

    a, b = experts(Grid(2, 2)), experts(Grid(4, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a[0] - a[1]).max() > 0.01
    assert a.std() == pytest.approx((0.1 / small.D) ** 0.5, rel=0.15)


def test_a_summary_says_who_works_how_much() -> None:
    config = small.config(capacity_factor=8.0, capacity_factor_intra=16.0)
    x = small.tokens(config)
    _, report = small.run(small.params(config), x, config)
    found = quick(moe.summary)(report)
    load = np.asarray(report.load).ravel()
    assert found["load_max"] == pytest.approx(load.max() / load.mean())
    share = load[load > 0] / load.sum()
    entropy = -(share * np.log(share)).sum() / np.log(load.size)
    assert found["load_entropy"] == pytest.approx(entropy, rel=1e-5)
