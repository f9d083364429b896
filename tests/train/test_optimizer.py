"""Schedules and update rules against closed forms."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import runs
from train import optimizer


def rates(**settings):
    config = runs.config(
        total_steps=20,
        optimizer__learning_rate=2.0,
        **{f"optimizer__{k}": v for k, v in settings.items()},
    )
    schedule = optimizer.make_schedule(config)
    return np.array([schedule(step) for step in range(21)])


def test_warm_up_begins_above_zero_and_reaches_the_peak():
    values = rates(warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(values[5:], 2.0)


def test_linear_and_cosine_end_at_the_ratio():
    linear = rates(warmup_steps=4, schedule="linear", end_ratio=0.1)
    np.testing.assert_allclose(linear[[4, 12, 20]], [2.0, 1.1, 0.2], rtol=1e-6)
    cosine = rates(warmup_steps=0, schedule="cosine", end_ratio=0.2)
    np.testing.assert_allclose(cosine[[0, 10, 20]], [2.0, 1.2, 0.4], rtol=1e-6)
    assert (np.diff(cosine) <= 0).all()


def update(labels, grads, params, **settings):
    config = runs.config(
        optimizer__schedule="constant", **{f"optimizer__{k}": v for k, v in settings.items()}
    )
    rule = optimizer.make_optimizer(config, labels)
    updates, _ = rule.update(grads, rule.init(params), params)
    return updates


LABELS = {"head": "head", "matrix": "decay", "scale": "no_decay", "table": "head_no_decay"}
PARAMS = {name: jnp.full(3, 2.0) for name in LABELS}
ZEROS = {name: jnp.zeros(3) for name in LABELS}


def test_weight_decay_spares_the_groups_named_so():
    moved = update(LABELS, ZEROS, PARAMS, learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    for name, step in {"head": -0.1, "matrix": -0.1, "scale": 0.0, "table": 0.0}.items():
        np.testing.assert_allclose(moved[name], step, rtol=1e-6, err_msg=name)


def test_a_multiplier_scales_its_group_alone():
    settings = {"learning_rate": 0.1, "weight_decay": 0.0, "warmup_steps": 0, "clip_norm": 0.0}
    ones = {name: jnp.ones(3) for name in LABELS}
    moved = update(LABELS, ones, PARAMS, **settings, **{"multiplier.head": 10.0})
    for name, step in {"head": -1.0, "matrix": -0.1, "scale": -0.1, "table": -0.1}.items():
        np.testing.assert_allclose(moved[name], step, rtol=1e-5, err_msg=name)


def test_a_multiplier_of_no_group_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.multiplier.head: no such group.*'decay'"):
        update({"w": "decay"}, {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, **{"multiplier.head": 2.0})


def test_clipping_is_of_the_global_norm():
    settings = {
        "name": "sgd",
        "b1": 0.0,
        "learning_rate": 1.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
    }
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    labels = {"a": "head", "b": "no_decay"}
    clipped = update(labels, grads, grads, clip_norm=1.0, **settings)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [-0.6, -0.8], rtol=1e-6)
    free = update(labels, grads, grads, clip_norm=0.0, **settings)
    np.testing.assert_allclose([free["a"][0], free["b"][0]], [-3, -4], rtol=1e-6)


def test_adamw_is_optax_adamw():
    params = {"w": jnp.arange(3.0), "head": jnp.ones(2)}
    labels = {"w": "decay", "head": "head"}
    config = runs.config(
        optimizer__clip_norm=0.0, optimizer__schedule="constant", optimizer__warmup_steps=0
    )
    o = config.optimizer
    ours = optimizer.make_optimizer(config, labels)
    theirs = optax.adamw(o.learning_rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    states = ours.init(params), theirs.init(params)
    for step in range(3):
        grads = {"w": jnp.sin(params["w"] + step), "head": jnp.cos(params["head"])}
        mine, first = ours.update(grads, states[0], params)
        other, second = theirs.update(grads, states[1], params)
        states = first, second
        for name in params:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adafactor", "sgd"])
def test_every_rule_moves_against_the_gradient(name):
    grads = {"head": jnp.ones((2, 3))}
    moved = update({"head": "head"}, grads, grads, name=name, warmup_steps=0)
    assert (moved["head"] < 0).all()
