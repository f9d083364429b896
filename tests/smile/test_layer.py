"""The layer on one device: against the dense formula, its own other paths, and bad rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.smile import Grid, moe
from tests.smile import small

ROUTINGS = ("one_level", "bi_level")


def close(a, b, tolerance: float = 2e-5) -> None:
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b
    )


def roomy(**changes):
    """Capacities that hold every row that can arrive."""
    factors = {"capacity_factor": 8.0, "capacity_factor_intra": 16.0}
    return small.config(**(factors | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"routing": "one_level", "activation": "relu"},
        {"routing": "bi_level", "activation": "gelu"},
        {"intra_router": "per_node", "activation": "gelu_new", "use_bias": False},
    ],
    ids=["one_level", "bi_level", "per_node"],
)
def test_with_room_for_all_the_layer_is_the_dense_formula(changes) -> None:
    config = roomy(**changes)
    params, x = small.params(config), small.tokens(config)
    y, report = small.run(params, x, config)
    wanted = small.dense(params, x.reshape(-1, small.D), config)
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
    assert report.load.sum() == 4 * small.TOKENS and report.dropped()["total"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("routing", "buffer_factor"),
    [("one_level", 16.0), ("bi_level", 0.75)],
    ids=["one_level_worst_case", "bi_level_overflows"],
)
def test_dropless_equals_capacity_for_all_in_value_and_gradient(routing, buffer_factor) -> None:
    config = roomy(routing=routing, z_coef=1e-3)
    dropless = dataclasses.replace(config, transport="ragged", buffer_factor=buffer_factor)
    params, x = small.params(config), small.tokens(config)
    mask = np.random.default_rng(2).random(x.shape[:3]) < 0.8
    (y, report), grads = small.gradients(params, x, config, mask)
    (y2, report2), grads2 = small.gradients(params, x, dropless, mask)
    close(y, y2)
    close(grads, grads2, 1e-4)
    np.testing.assert_array_equal(report.load, report2.load)
    assert report2.overflow == (buffer_factor < 1)  # the safe path ran, and lost nothing
    assert report2.dropped()["total"] == 0


@pytest.fixture(scope="module", params=ROUTINGS)
def tight(request):
    """A layer that drops, with its result."""
    config = small.config(routing=request.param, capacity_factor=1.0)
    params, x = small.params(config), small.tokens(config)
    mask = np.random.default_rng(2).random(x.shape[:3]) < 0.8
    y, report = small.run(params, x, config, mask)
    assert report.dropped()["total"] > 0.1
    return config, params, x, mask, y, report


def test_dropped_and_masked_tokens_give_zero(tight) -> None:
    config, params, x, mask, y, report = tight
    assert not y[~mask].any()
    zero = (y == 0).all(-1) & mask
    assert zero.sum() / mask.sum() == pytest.approx(float(report.dropped()["total"]))
    assert report.load.sum() == mask.sum() - zero.sum()


def test_masked_tokens_change_nothing_even_where_they_are_nan(tight) -> None:
    config, params, x, mask, y, report = tight
    other = np.where(mask[..., None], x, np.float32(np.nan))
    y2, report2 = small.run(params, other, config, mask)
    np.testing.assert_array_equal(y2, y)
    close(report2, report, 1e-6)


def test_a_token_that_is_nan_harms_no_other(tight) -> None:
    config, params, x, mask, y, _ = tight
    # The last real token of the last device: nobody's place depends on it.
    t = int(np.flatnonzero(mask[-1, -1])[-1])
    broken = x.copy()
    broken[-1, -1, t, 0] = np.nan
    y2, _ = small.run(params, broken, config, mask)
    np.testing.assert_array_equal(y2[:, 0], y[:, 0])
    others = np.delete(np.arange(x.shape[2]), t)
    np.testing.assert_array_equal(y2[-1, -1, others], y[-1, -1, others])


def test_a_device_of_padding_and_one_of_nothing_but_padding(tight) -> None:
    config, params, x, mask, _, _ = tight
    alone = mask.copy()
    alone[0, 1] = False
    y, report = small.run(params, x, config, alone)
    assert not y[0, 1].any()
    assert all(np.isfinite(v) for v in report.balances().values())
    nothing, report = small.run(params, x, config, np.zeros_like(mask))
    assert not nothing.any() and report.load.sum() == 0
    assert all(v == 0 for v in report.balances().values())
    assert np.isfinite(moe.auxiliary_loss(report, config))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_of_padding_alone_are_finite_and_zero(routing) -> None:
    config = roomy(routing=routing, z_coef=1e-3)
    params, x = small.params(config), small.tokens(config)
    _, grads = small.gradients(params, x, config, np.zeros(x.shape[:3], bool))
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_permuting_the_tokens_of_a_device_permutes_its_outputs() -> None:
    config = roomy(activation="gelu")
    params, x = small.params(config), small.tokens(config)
    order = np.random.default_rng(3).permutation(small.TOKENS)
    y, _ = small.run(params, x, config)
    y2, _ = small.run(params, x[:, :, order], config)
    close(y2, y[:, :, order], 1e-6)


@pytest.mark.parametrize("grid", [Grid(1, 4), Grid(4, 1)], ids=["one_node", "one_device"])
def test_with_one_level_trivial_two_levels_are_one(grid) -> None:
    one = roomy(routing="one_level", grid=grid, num_experts=4)
    two = dataclasses.replace(one, routing="bi_level")
    params, x = small.params(one), small.tokens(one)
    trivial = np.ones((small.D, 1), np.float32)
    names = (
        ("router_inter", "router_intra") if grid.nodes == 1 else ("router_intra", "router_inter")
    )
    split = {names[0]: trivial, names[1]: params["router"], "experts": params["experts"]}
    close(small.run(split, x, two)[0], small.run(params, x, one)[0], 1e-6)


def test_routing_that_changes_compiles_nothing_again() -> None:
    config = small.config(capacity_factor=1.0)
    quick = functools.partial(jax.jit, compiler_options=small.QUICK)
    run = quick(lambda params, x: moe.apply(params, x, config)[0])
    for seed in range(3):
        run(small.params(config, seed), small.tokens(config, seed))
    assert run._cache_size() == 1


def test_jitter_is_drawn_for_training_only_and_by_the_key() -> None:
    config = roomy(jitter=0.5)
    params, x = small.params(config), small.tokens(config)

    @functools.partial(jax.jit, compiler_options=small.QUICK)
    def train(params, x, key):
        return moe.apply(params, x, config, deterministic=False, rng=key)[0]

    a, b = jax.device_get([train(params, x, jax.random.key(seed)) for seed in range(2)])
    assert np.abs(a - b).max() > 1e-3
    plain = small.run(params, x, dataclasses.replace(config, jitter=0.0))[0]
    # Evaluation has its own capacity, which holds all here as well.
    still = dataclasses.replace(config, eval_capacity_factor=8.0)
    close(small.run(params, x, still, deterministic=True)[0], plain, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_are_those_of_finite_differences(routing) -> None:
    jax.config.update("jax_enable_x64", True)
    config = small.config(routing=routing, capacity_factor=1.0, z_coef=1e-3, dtype=jnp.float64)
    wide = lambda tree: jax.tree.map(np.float64, tree)  # noqa: E731
    params, x = wide(small.params(config)), wide(small.tokens(config))

    def objective(params, x):
        y, report = moe.apply(params, x, config, deterministic=False)
        return (y * jnp.sin(y)).sum() + moe.auxiliary_loss(report, config)

    value = jax.jit(objective, compiler_options=small.QUICK)
    gradient = jax.jit(jax.grad(objective, (0, 1)), compiler_options=small.QUICK)
    grads = jax.device_get(gradient(params, x))
    leaves, structure = jax.tree.flatten((params, x))
    rng, step = np.random.default_rng(5), 1e-5
    for number, found in enumerate(jax.tree.leaves(grads)):
        direction = rng.normal(size=found.shape)
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[number] = leaves[number] + sign * step * direction
            ends.append(float(value(*jax.tree.unflatten(structure, moved))))
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert float((found * direction).sum()) == pytest.approx(numeric, rel=1e-7)
        assert found.dtype == np.float64 and np.abs(found).max() > 0


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16_travels_and_stays_near_float32(routing) -> None:
    config = roomy(routing=routing)
    params, x = small.params(config), small.tokens(config).astype(jnp.bfloat16)
    y, _ = small.run(params, x, dataclasses.replace(config, dtype=jnp.bfloat16))
    wanted, _ = small.run(params, x.astype(np.float32), config)
    assert y.dtype == jnp.bfloat16
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(y.astype(np.float32), wanted, atol=3e-2 * scale)


def test_chunks_change_nothing_where_nothing_is_dropped() -> None:
    config = roomy(chunks=3)
    params, x = small.params(config), small.tokens(config)
    y, report = small.run(params, x, config)
    whole, wanted = small.run(params, x, dataclasses.replace(config, chunks=1))
    close(y, whole, 1e-6)
    close(report, wanted, 1e-6)
