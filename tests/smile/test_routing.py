"""Choices, places and capacities of the routers, against loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.smile import losses, routing


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=24))
@settings(max_examples=40, deadline=None)
def test_positions_count_valid_rows_of_the_same_bucket_in_order(rows: list) -> None:
    index = np.array([r[0] for r in rows] + [0] * (24 - len(rows)), np.int32)
    valid = np.array([r[1] for r in rows] + [False] * (24 - len(rows)))
    seen, wanted = [0] * 5, []
    for bucket, real in zip(index, valid, strict=True):
        wanted.append(seen[bucket] if real else -1)
        seen[bucket] += int(real)
    np.testing.assert_array_equal(_positions(index, valid), wanted)
    np.testing.assert_array_equal(routing.counts(index, valid, 5), seen)


_positions = jax.jit(lambda index, valid: routing.positions(index, valid, 5))
_route = jax.jit(routing.route)


def test_positions_are_exact_behind_the_integers_of_bfloat16() -> None:
    index, valid = np.zeros(700, np.int32), np.ones(700, bool)
    np.testing.assert_array_equal(_positions(index, valid), np.arange(700))


@pytest.mark.parametrize(
    ("tokens", "buckets", "factor", "wanted"),
    [(16, 8, 1.0, 2), (16, 8, 1.25, 3), (12, 4, 1.25, 4), (16, 32, 1.0, 1), (10, 4, 1.2, 3)],
)
def test_capacity_rounds_up_but_not_over_a_rounding_error(tokens, buckets, factor, wanted) -> None:
    assert routing.capacity(tokens, buckets, factor) == wanted


def test_capacity_keeps_minimum_and_multiple() -> None:
    assert routing.capacity(16, 32, 1.0, minimum=4) == 4
    assert routing.capacity(100, 8, 1.25, multiple=8) == 16


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_a_capacity_that_is_no_positive_number_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="None for no capacity"):
        routing.capacity(16, 4, factor)


def test_the_lowest_index_wins_exact_ties() -> None:
    kernel = np.float32([[1.0, 2.0, 2.0], [0.5, 1.0, 1.0]])
    x = np.float32([[1.0, 2.0], [-1.0, 0.25], [0.0, 0.0]])
    routed = _route(x, kernel, np.ones(3, bool))
    np.testing.assert_array_equal(routed.index, [1, 0, 0])


def test_a_row_that_is_not_finite_chooses_bucket_0_and_harms_no_other() -> None:
    kernel = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    broken = x.copy()
    broken[1, 2], broken[3] = np.nan, np.inf
    valid = np.ones(5, bool)
    routed, plain = jax.device_get([_route(broken, kernel, valid), _route(x, kernel, valid)])
    np.testing.assert_array_equal(routed.index[[1, 3]], [0, 0])
    others = [0, 2, 4]
    np.testing.assert_array_equal(routed.gate[others], plain.gate[others])


def test_a_masked_nan_reaches_neither_losses_nor_gradients() -> None:
    x = np.float32([[1, 1], [1, 1], [np.nan, 1]])
    mask = np.array([True, True, False])

    def loss(kernel: jax.Array) -> jax.Array:
        sums = losses.router_sums(routing.route(x, kernel, mask), mask)
        return losses.balance(sums) + losses.z_loss(sums)

    value, grad = jax.jit(jax.value_and_grad(loss))(np.float32([[0.1, 0.2], [0.3, -0.2]]))
    assert np.isfinite(value) and np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_the_router_is_float32_for_bfloat16_tokens() -> None:
    routed = _route(jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3)), jnp.ones(2, bool))
    assert routed.logits.dtype == routed.gate.dtype == jnp.float32


def test_balance_is_1_when_even_and_k_when_collapsed() -> None:
    probs = np.full((4, 4), 0.25, np.float32)
    valid, index = np.ones(4, bool), np.arange(4)
    even = routing.Route(np.log(probs), probs, index, probs[:, 0], valid)
    balance = jax.jit(lambda routed: losses.balance(losses.router_sums(routed, valid)))
    assert balance(even) == pytest.approx(1.0)
    sure = np.eye(4, dtype=np.float32)[[0] * 4]
    one = routing.Route(sure, sure, np.zeros(4, np.int32), sure[:, 0], valid)
    assert balance(one) == pytest.approx(4.0)


def test_an_empty_device_does_not_lower_the_balance_loss() -> None:
    sums = losses.RouterSums(
        rows=np.array([8.0, 0.0]),
        chosen=np.array([[8.0, 0.0], [0.0, 0.0]]),
        probs=np.array([[7.0, 1.0], [0.0, 0.0]]),
        z=np.zeros(2),
        kept=np.zeros(2),
    )
    assert losses.balance_loss(sums) == pytest.approx(2 * 7 / 8)
    assert losses.balance_loss(sums, "device_mean") == pytest.approx(7 / 8)
    assert losses.balance_loss(sums, "global") == pytest.approx(2 * 7 / 8)
    with pytest.raises(ValueError, match="device_mean"):
        losses.balance_loss(sums, "mean")
