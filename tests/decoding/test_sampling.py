"""Samples follow the filtered distribution and the key, nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import decoding
from jaxmodels.decoding import GenerationSettings, sampling
from tests.decoding import tables


def draw(settings: GenerationSettings, seed: int, logits: np.ndarray) -> decoding.Generated:
    prompt = np.asarray([[5, 3], [4, 6]], np.int32)
    return tables.program(settings, logits, prompt, None, jax.random.key(seed))


def test_the_key_decides_and_rows_differ() -> None:
    logits = tables.table(0, scale=0.5)
    settings = GenerationSettings(max_new_tokens=12, do_sample=True, num_return_sequences=3)
    one, again, other = (np.asarray(draw(settings, s, logits).sequences) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    np.testing.assert_array_equal(one[:, :2], [[5, 3]] * 3 + [[4, 6]] * 3)
    assert len({tuple(row) for row in one[:, 2:]}) == 6


def test_frequencies_are_the_filtered_probabilities() -> None:
    logits = tables.table(1, scale=1.5)
    settings = GenerationSettings(
        max_new_tokens=2, do_sample=True, temperature=1.3, top_k=9, top_p=0.9,
        num_return_sequences=20_000,
    )  # fmt: skip
    found = draw(settings, 0, logits)
    tokens = np.asarray(found.sequences)[:20_000]
    cut = decoding.filter_logits(jnp.asarray(logits), settings.__class__(do_sample=True))
    np.testing.assert_array_equal(cut, logits)  # nothing is on by default
    first = np.asarray(jax.nn.softmax(decoding.filter_logits(logits[5, 3][None], settings))[0])
    counts = np.bincount(tokens[:, 2], minlength=tables.VOCAB) / len(tokens)
    np.testing.assert_allclose(counts, first, atol=4 * np.sqrt(0.25 / len(tokens)))
    assert ((first == 0) == (counts == 0)).all() and 1 < (first > 0).sum() <= 9
    likely = int(first.argmax())
    second = np.asarray(
        jax.nn.softmax(decoding.filter_logits(logits[3, likely][None], settings))[0]
    )
    after = tokens[tokens[:, 2] == likely, 3]
    counts = np.bincount(after, minlength=tables.VOCAB) / len(after)
    np.testing.assert_allclose(counts, second, atol=4 * np.sqrt(0.25 / len(after)))
    rows = tokens[:, 2] == likely
    expected = np.log(first[likely]) + np.log(second[after])
    np.testing.assert_allclose(np.asarray(found.scores)[:20_000][rows], expected, rtol=1e-4)


def test_nearly_no_temperature_is_greedy() -> None:
    logits = tables.table(2)
    cold = GenerationSettings(max_new_tokens=9, do_sample=True, temperature=1e-4)
    greedy = GenerationSettings(max_new_tokens=9)
    np.testing.assert_array_equal(
        draw(cold, 0, logits).sequences, draw(greedy, 0, logits).sequences
    )


def test_top_p_keeps_one_token_and_top_k_keeps_equals() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    kept = np.isfinite(sampling.keep_top_p(logits, 1e-6))
    np.testing.assert_array_equal(kept, [[0, 0, 1, 0], [1, 0, 0, 0]])
    kept = np.isfinite(sampling.keep_top_k(logits, 1))
    np.testing.assert_array_equal(kept, [[0, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(sampling.keep_top_k(logits, 99), logits)
