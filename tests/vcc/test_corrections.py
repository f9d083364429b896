"""Behaviour of the official code that can be corrected by a setting: counts, votes, VIP marks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.vcc import compression, rows
from tests.vcc import small, small_t5


@pytest.mark.parametrize("keep_all", [True, False], ids=["static", "gather"])
def test_exact_counts_weigh_a_partly_padded_block_by_its_real_tokens(keep_all: bool) -> None:
    x, mask, vip = small.states(real=22)  # the last but one of six blocks has two tokens
    state, layout = small.enter(x, mask, vip, 4, 4)
    fine, rest = jnp.array([[1, 0]] * 2), jnp.array([[2, 3, 4, 5]] * 2)
    chosen = compression.Selection(jnp.zeros(()), jnp.zeros((2, 6)), fine, rest, jnp.ones((2, 6)))
    found, official = (
        rows.gather_rows(
            state, layout, chosen, scale_correction=True, keep_all=keep_all, exact_counts=exact
        ).bias[:, -8:-4]  # blocks 2 to 5
        for exact in (True, False)
    )
    counts = layout.mask.sum(-1)[:, 2:]
    assert counts[0].tolist() == [4, 4, 2, 0]
    expected = official + jnp.log(counts + 1e-4) - jnp.log(4 + 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_exact_counts_change_nothing_without_padding() -> None:
    given, params = small_t5.inputs(), small_t5.params(small_t5.RELU)
    one, other = (
        small_t5.encode(small_t5.RELU, small.vcc(exact_counts=exact), params, given)[0]
        for exact in (True, False)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_exact_counts_make_a_partial_block_equal_to_its_tokens_where_they_agree() -> None:
    """Two equal tokens and two of padding, closed, attend and are attended to like the two open."""
    config, params = small_t5.RELU, small_t5.params(small_t5.RELU)
    x, mask, vip = small.states(1, 12, 6, vips=4)
    vip = jnp.zeros_like(vip).at[0, :4].set(1)
    x = x.at[0, 5].set(x[0, 4])
    flat = jax.tree.map(lambda leaf: leaf, params)
    table = flat["encoder"]["relative_bias"]["embedding"]
    flat["encoder"]["relative_bias"] = {"embedding": jnp.zeros_like(table)}
    after = {}
    for fine, exact in ((2, True), (0, True), (0, False)):
        settings = small.vcc(num_fine_blocks=fine, exact_counts=exact)
        states = small_t5.run_layers(config, settings, flat, x, mask, vip)[0]
        after[fine, exact] = states[1].vip  # after one layer the means hold exactly
    error, official = (
        float(jnp.abs(after[0, exact] - after[2, True]).max()) for exact in (True, False)
    )
    assert error < 2e-3 < 0.02 < official  # the mean itself is off by 1e-4 / count


def test_votes_by_vips_do_not_sink_under_the_floor_with_empty_slots() -> None:
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, 2, 32, 6)), axis=-1)
    layout = compression.Layout(
        order=jnp.arange(44)[None],
        vip_mask=jnp.ones((1, 32)),
        importance=jnp.zeros((1, 32)).at[0, 5].set(1),
        mask=jnp.ones((1, 6, 2)),
    )
    slots, vips = (
        compression.select(weights, layout, 2, vote_average=name) for name in ("slots", "vips")
    )
    votes = np.asarray(weights)[0, :, 5].mean(0)
    np.testing.assert_allclose(slots.scores[0], np.log(votes / 32 + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(vips.scores[0], np.log(votes + 1e-5), rtol=1e-5)
    assert slots.fine.tolist() == vips.fine.tolist()  # the order is the same, the gates are not
    nobody = layout.replace(importance=jnp.zeros((1, 32)))
    found = compression.select(weights, nobody, 2, vote_average="vips")
    assert found.fine.tolist() == [[0, 1]] and np.isfinite(found.scores).all()


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vote_average='all': use one of slots, vips"):
        small.vcc(vote_average="all")
