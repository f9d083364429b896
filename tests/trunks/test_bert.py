"""BERT and RoBERTa trunks: their formula in numpy, dropout, the pooler, refusals, flat compile."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.trunks import bert
from tests.core.test_blocks import attend, feed_forward, linear, norm
from tests.vcc import small
from tests.vcc.test_encoder import equations

IDS = jax.random.randint(jax.random.key(0), (2, 9), 5, 50)
MASK = jnp.asarray([[1] * 9, [1] * 6 + [0] * 3])


def started(config: bert.BertConfig) -> tuple[bert.BertModel, Any]:
    """The model, and parameters large enough that every part of the formula counts."""
    model = bert.BertModel(config)
    return model, small.drawn(model.init, IDS, size=0.2, spread=True)


@pytest.mark.parametrize(("order", "offset"), [("pre", 2), ("post", 0)])
def test_model_is_its_formula(order: str, offset: int) -> None:
    config = small.trunk(norm_order=order, position_offset=offset, norm_eps=1e-5)
    model, params = started(config)
    types, positions = IDS % 2, jnp.broadcast_to(jnp.arange(9)[::-1], IDS.shape)
    found = jax.jit(model.apply)(params, IDS, MASK, types, positions)
    p: Any = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    tables, layers = p["embeddings"], p["encoder"]["layers"]
    x = tables["word"]["embedding"][IDS] + tables["token_type"]["embedding"][types]
    x = norm(x + tables["position"]["embedding"][positions + offset], tables["norm"])
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        if order == "pre":
            x = x + attend(norm(x, one["attention_norm"]), one["attention"], np.asarray(MASK), 2)
            x = x + feed_forward(norm(x, one["ffn_norm"]), one["ffn"])
        else:
            x = norm(x + attend(x, one["attention"], np.asarray(MASK), 2), one["attention_norm"])
            x = norm(x + feed_forward(x, one["ffn"]), one["ffn_norm"])
    if order == "pre":
        x = norm(x, p["encoder"]["final_norm"])
    else:
        assert "final_norm" not in p["encoder"]
    np.testing.assert_allclose(found, x, atol=2e-5)


def test_defaults_are_ones_zeros_and_running_positions() -> None:
    model, params = started(small.trunk())
    given = (jnp.ones_like(IDS), jnp.zeros_like(IDS), jnp.broadcast_to(jnp.arange(9), IDS.shape))
    run = jax.jit(model.apply)
    expected = run(params, IDS, *given)
    chex.assert_trees_all_close(run(params, IDS), expected, rtol=1e-5, atol=1e-6)


def test_pooler_reads_the_first_token_alone() -> None:
    model, params = started(small.trunk(pooler=True))
    hidden = jax.random.normal(jax.random.key(5), (2, 9, 16))
    found = model.apply(params, hidden, method="pool")
    expected = np.tanh(linear(np.asarray(hidden[:, 0]), params["params"]["pooler"]))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "pooler" not in started(small.trunk())[1]["params"]


def test_mlm_head_is_its_formula() -> None:
    head = bert.MLMHead(vocab_size=30)
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    params = small.drawn(head.init, x, size=0.2, spread=True)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    one = {"kernel": np.eye(16), "bias": np.zeros(16)}
    inner = feed_forward(np.asarray(x), {"wi": p["dense"], "wo": one})  # the same exact GELU
    expected = linear(norm(inner, p["norm"]), p["decoder"])
    np.testing.assert_allclose(head.apply(params, x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_acts_only_while_training_and_follows_its_rng() -> None:
    model, params = started(small.trunk(dropout_rate=0.2, attention_dropout_rate=0.2))
    plain, same = started(small.trunk())
    run = jax.jit(
        lambda key: model.apply(params, IDS, MASK, deterministic=False, rngs={"dropout": key})
    )
    quiet = jax.jit(model.apply)(params, IDS, MASK)
    chex.assert_trees_all_equal(quiet, jax.jit(plain.apply)(same, IDS, MASK))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert float(jnp.abs(one - quiet).max()) > 0.1 < float(jnp.abs(one - other).max())
    with pytest.raises(Exception, match="dropout"):
        model.apply(params, IDS, MASK, deterministic=False)


def test_masked_tokens_change_no_other() -> None:
    model, params = started(small.trunk())
    run = jax.jit(model.apply)
    found, other = run(params, IDS, MASK), run(params, jnp.where(MASK == 1, IDS, 11), MASK)
    chex.assert_trees_all_equal(found[:, :6], other[:, :6])


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
def test_program_does_not_grow_with_depth(policy: str) -> None:
    sizes = []
    for depth in (2, 12):
        model, params = started(small.trunk(num_layers=depth, remat=policy))
        traced = jax.make_jaxpr(jax.grad(lambda p, m=model: m.apply(p, IDS).sum()))(params)
        sizes.append(equations(traced.jaxpr))
    assert sizes[0] == sizes[1] > 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.d_model=16"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"vocab_size": -1}, "model.vocab_size=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small.trunk(**change)


def test_input_beyond_the_position_table_is_refused_unless_positions_are_given() -> None:
    model, params = started(small.trunk(max_positions=9))
    longer = jnp.pad(IDS, ((0, 0), (0, 1)))
    with pytest.raises(ValueError, match="10 tokens, but the position table has 9"):
        model.apply(params, longer)
    restarted = jnp.broadcast_to(jnp.arange(10) % 5, longer.shape)
    assert model.apply(params, longer, position_ids=restarted).shape == (2, 10, 16)


def test_bfloat16_products_stay_near_float32() -> None:
    model, params = started(small.trunk())
    half = bert.BertModel(small.trunk(dtype=jnp.bfloat16))
    full, found = model.apply(params, IDS, MASK), half.apply(params, IDS, MASK)
    assert found.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(found - full).max() / jnp.abs(full).max()) < 0.05
