"""Two stages over a wide row are one stage: the same largest entries, draws and thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.decoding import sampling, wide_rows


@pytest.mark.parametrize(("size", "k"), [(5000, 8), (4096, 1), (1500, 40), (1024, 500), (9, 9)])
def test_top_k_is_laxs_with_ties_and_infinities(size: int, k: int) -> None:
    rng = np.random.default_rng(size)
    rounded = np.round(rng.normal(0, 3, (6, size))).astype(np.float32)
    rounded[1:3, rng.random(size) < 0.9] = -np.inf
    rounded[3] = -np.inf
    rounded[4] = 0.0
    for x in (rounded, rng.normal(size=(6, size)).astype(np.float32)):
        found, expected = wide_rows.top_k(jnp.asarray(x), k), jax.lax.top_k(jnp.asarray(x), k)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("size", [9, 2000])
def test_draws_have_the_probabilities_of_the_softmax(size: int) -> None:
    logits = np.random.default_rng(0).normal(0, 4, size).astype(np.float32)
    logits[3:7] = -np.inf
    probs = np.asarray(jax.nn.softmax(logits))
    many = 20_000
    rows = jnp.broadcast_to(logits, (many, size))
    found = np.asarray(wide_rows.draw(jax.random.key(0), rows))
    counts = np.bincount(found, minlength=size) / many
    assert len(counts) == size and not counts[3:7].any()
    deviation = np.sqrt(probs * (1 - probs) / many) + 1 / many
    assert (np.abs(counts - probs) < 5 * deviation).all()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_rule_written_out_with_a_sort(p: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (8, 3000)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many equals
    logits[2] = 0.0
    logits[3, ::2] = -np.inf
    logits[4] = -np.abs(logits[4])
    logits[5, 7] = 60.0  # takes all the probability
    found = np.asarray(jax.jit(lambda x: sampling.keep_top_p(x, p))(logits))
    for row, kept in zip(logits.astype(np.float64), np.isfinite(found), strict=True):
        probs = np.exp(row - row.max())
        probs /= probs.sum()
        ascending = np.argsort(row, kind="stable")
        cut = np.cumsum(probs[ascending]) <= 1 - p
        expected = np.ones(len(row), bool)
        expected[ascending[:-1][cut[:-1]]] = False
        assert kept.any() and (row[~kept].max(initial=-np.inf) <= row[kept].min())
        # Rounding of the sums may move one token at the boundary.
        assert abs(int(expected.sum()) - int(kept.sum())) <= 1
        assert (expected != kept).sum() <= 1
