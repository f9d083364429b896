"""The compressed form: exact round trips, closed-form gradients, and what a layer may not touch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.vcc import compression
from jaxmodels.vcc.rows import gather_rows
from tests.vcc import small

CONFIG = small.trunk()
PARAMS = small.layer_params(CONFIG)


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("real", "vips"), [(28, 3), (17, 3), (28, 0), (28, 7), (5, 5)])
def test_leaving_what_was_entered_gives_the_masked_tokens_back(real: int, vips: int) -> None:
    x, mask, vip = small.states(real=real, vips=vips)
    state, layout = small.enter(x, mask, vip, 4, 4)
    back = small.leave(state, layout)
    # C - (C - x) rounds twice at the larger of C and x: one ulp of the block's scale.
    ulp = np.spacing(np.float32(jnp.abs(x).max() * 2))
    chex.assert_trees_all_close(back, x * mask[..., None], rtol=0, atol=float(ulp))
    assert (np.asarray(back)[:, real:] == 0).all()


@pytest.mark.parametrize(
    ("marked", "slots", "votes"),
    [
        ((3, 9, 5, 1), (1, 3, 5, 9), (1, 1, 1, 1)),
        ((7, 2), (2, 7, 0, 1), (1, 1, 0, 0)),  # free slots: the earliest ordinary tokens
        ((), (0, 1, 2, 3), (0, 0, 0, 0)),
        ((0, 2, 4, 6, 8, 10), (0, 2, 4, 6), (1, 1, 1, 1)),  # the latest VIPs are demoted
    ],
)
def test_vip_slots_hold_vips_in_text_order_then_the_earliest_others(
    marked: tuple[int, ...], slots: tuple[int, ...], votes: tuple[int, ...]
) -> None:
    vip = np.zeros((1, 12), np.int32)
    vip[0, list(marked)] = 1
    x = jnp.arange(12.0)[None, :, None] + 1
    state, layout = small.enter(x, jnp.ones((1, 12)), jnp.asarray(vip), 4, 4)
    assert tuple(layout.order[0, :4].tolist()) == slots
    assert tuple(layout.importance[0].tolist()) == votes
    assert tuple(state.vip[0, :, 0].tolist()) == tuple(s + 1.0 for s in slots)
    inside = layout.order[0, 4:].tolist()
    demoted = [i for i in marked if i not in slots]
    assert inside == demoted + sorted(set(range(12)) - set(slots) - set(demoted))


@pytest.mark.parametrize("kept", [(1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 0)])
def test_a_block_is_its_masked_mean_and_the_differences_to_it(kept: tuple[int, ...]) -> None:
    x, mask = np.asarray(random(0, 4, 3)), np.array(kept, np.float32)[:, None]
    mean, difference = compression.compress(jnp.asarray(x), jnp.asarray(kept))
    expected = (x * mask).sum(0) / (mask.sum() + 1e-4)
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(difference, expected - x * mask, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_gradient_of_compress_is_the_closed_form(count: int) -> None:
    mask = (jnp.arange(4) < count).astype(jnp.float32)
    mean_bar, difference_bar = random(1, 2, 3), random(2, 2, 4, 3)
    _, vjp = jax.vjp(lambda x: compression.compress(x, jnp.stack([mask] * 2)), random(0, 2, 4, 3))
    shared = (mean_bar + difference_bar.sum(1)) / (count + 1e-4)
    expected = mask[:, None] * (shared[:, None] - difference_bar)
    chex.assert_trees_all_close(vjp((mean_bar, difference_bar))[0], expected, atol=1e-6)


def test_gradient_of_refine_reaches_the_opened_blocks_alone() -> None:
    state = compression.State(random(0, 1, 4, 3), random(1, 1, 5, 3), random(2, 1, 5, 2, 3))
    fine, bar = jnp.array([[3, 1]]), random(3, 1, 2, 2, 3)
    _, vjp = jax.vjp(lambda s: compression.refine(s, fine), state)
    (found,) = vjp(bar)
    coarse, difference = np.zeros((1, 5, 3)), np.zeros((1, 5, 2, 3))
    for j, block in enumerate((3, 1)):
        coarse[0, block] = bar[0, j].sum(0)
        difference[0, block] = -bar[0, j]
    expected = compression.State(jnp.zeros((1, 4, 3)), jnp.asarray(coarse), jnp.asarray(difference))
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize("layout_name", ["static", "gather"])
def test_writing_back_changes_the_differences_of_opened_blocks_alone(layout_name: str) -> None:
    settings = small.vcc(layout=layout_name)
    state, layout = small.enter(*small.states(), 4, 4)
    one = jax.tree.map(lambda leaf: leaf[:1], PARAMS)
    after, chosen = small.run_layers(CONFIG, settings, one, state, layout)
    for row in range(2):
        opened = set(chosen.fine[0, row].tolist())
        assert sorted(chosen.fine[0, row].tolist() + chosen.rest[0, row].tolist()) == list(range(6))
        for block in range(6):
            same = bool((after.difference[row, block] == state.difference[row, block]).all())
            assert same == (block not in opened)
    assert float(jnp.abs(after.coarse - state.coarse).min(-1).max()) > 0  # every mean moves


@pytest.mark.parametrize("gain", [4.0, 12.0])
def test_tokens_of_a_block_never_opened_move_by_one_common_vector(gain: float) -> None:
    x, mask, vip = small.states(batch=3, n=44)
    state, layout = small.enter(x, mask, vip, 4, 4)
    params = small.layer_params(CONFIG, gain)
    after, chosen = small.run_layers(CONFIG, small.vcc(), params, state, layout)
    closed = np.ones((3, 10), bool)
    for row in range(3):
        closed[row, np.unique(chosen.fine[:, row])] = False
    before, now = (compression.decompress(s.coarse, s.difference) for s in (state, after))
    moved = np.asarray(now - before)[closed]
    assert len(moved) > 3 and np.abs(moved).max() > 0.1
    assert np.abs(moved - moved.mean(1, keepdims=True)).max() <= 1e-5


def vips_after(x: jax.Array, mask: jax.Array, vip: jax.Array, size: int) -> jax.Array:
    state, layout = small.enter(x, mask, vip, 4, size)
    after, _ = small.run_layers(CONFIG, small.vcc(block_size=size), PARAMS, state, layout)
    return after.vip


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 7])
def test_appending_whole_padded_blocks_changes_no_vip(blocks: int) -> None:
    x, mask, vip = small.states()
    longer = [jnp.pad(a, ((0, 0), (0, 4 * blocks)) + ((0, 0),) * (a.ndim - 2))
              for a in (x, mask, vip)]  # fmt: skip
    chex.assert_trees_all_close(vips_after(x, mask, vip, 4), vips_after(*longer, 4), atol=1e-5)


def test_order_of_tokens_within_a_block_changes_no_vip() -> None:
    x, mask, vip = small.states()
    state, layout = small.enter(x, mask, vip, 4, 4)
    chosen = small.run_layers(CONFIG, small.vcc(), PARAMS, state, layout)[1]
    block = next(j for j in range(6) if j not in np.asarray(chosen.fine)[:, 0])
    tokens = layout.order[0, 4 + 4 * block : 8 + 4 * block]
    shuffled = x.at[0, tokens].set(x[0, tokens[jnp.array([2, 0, 3, 1])]])
    assert float(jnp.abs(shuffled - x).max()) > 0.1
    chex.assert_trees_all_close(
        vips_after(x, mask, vip, 4), vips_after(shuffled, mask, vip, 4), atol=1e-5
    )


def test_votes_of_other_slots_do_not_choose_blocks() -> None:
    weights = jax.nn.softmax(3 * random(0, 1, 2, 3, 5), axis=-1)
    layout = compression.Layout(
        order=jnp.arange(13)[None],
        vip_mask=jnp.ones((1, 3)),
        importance=jnp.array([[1.0, 0.0, 1.0]]),
        mask=jnp.ones((1, 5, 2)),
    )
    chosen = compression.select(weights, layout, 2)
    voted = (np.asarray(weights)[0, :, 0] + np.asarray(weights)[0, :, 2]).mean(0) / 3
    np.testing.assert_allclose(chosen.scores[0], np.log(voted + 1e-5), rtol=1e-5)
    assert chosen.fine[0].tolist() == np.argsort(-voted)[:2].tolist()
    np.testing.assert_allclose(chosen.gate, 1, rtol=0, atol=2.0**-23)


@pytest.mark.slow
def test_ties_go_to_the_lowest_blocks_and_gates_carry_signed_gradient() -> None:
    layout = compression.Layout(
        jnp.arange(21)[None], jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 20, 1))
    )
    flat = jnp.full((1, 1, 1, 20), 1 / 20)
    assert compression.select(flat, layout, 3).fine[0].tolist() == [0, 1, 2]

    def gates(logits: jax.Array) -> jax.Array:
        weights = jax.nn.softmax(logits)[None, None, None]
        return compression.select(weights, layout, 3).gate[0]

    def shares(logits: jax.Array) -> jax.Array:
        voted = jax.nn.softmax(logits) + 1e-5
        return voted / voted.sum()

    logits = random(4, 20)
    fine = compression.select(jax.nn.softmax(logits)[None, None, None], layout, 3).fine[0]
    sign = -np.ones((20, 1))
    sign[np.asarray(fine)] = 1
    found, expected = jax.jacobian(gates)(logits), jax.jacobian(shares)(logits) * sign
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_keys_count_the_tokens_they_stand_for_and_hide_padding() -> None:
    x, mask, vip = small.states(real=24)  # the last of six blocks is padding
    state, layout = small.enter(x, mask, vip, 4, 4)
    fine, rest = jnp.array([[1, 0]] * 2), jnp.array([[2, 3, 4, 5]] * 2)
    gate = jnp.ones((2, 6))
    chosen = compression.Selection(jnp.zeros(()), jnp.zeros((2, 6)), fine, rest, gate)
    rows = gather_rows(state, layout, chosen, scale_correction=True, keep_all=False)
    expected = np.log1p(1e-4) * 2 * np.ones(16)
    expected[8:12] += np.log(4 + 1e-4) - np.log1p(1e-4)
    expected[11] -= 1000
    np.testing.assert_allclose(rows.bias[0], expected, rtol=1e-6, atol=2e-5)
    kept = gather_rows(state, layout, chosen, scale_correction=True, keep_all=True)
    assert (kept.bias[0, 8:10] == -1e9).all() and (kept.bias[0, 10:14] == rows.bias[0, 8:12]).all()


@pytest.mark.parametrize(
    ("positions", "expected"), [((0, 1), 0), ((1, 2), 2), ((2, 3), 2), ((3, 4), 4), ((0, 0, 1), 0)]
)
def test_block_positions_round_half_to_even(positions: tuple[int, ...], expected: int) -> None:
    assert int(compression.block_positions(jnp.array([positions]))[0]) == expected


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 8), (4, 8), (5, 8), (8, 8), (9, 12), (4096, 4096), (4097, 4100)]
)
def test_padded_length_is_the_shortest_legal_one(n: int, expected: int) -> None:
    assert compression.padded_length(n, 4, 4) == expected
