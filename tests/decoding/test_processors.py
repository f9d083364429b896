"""Each processor by its rule, written out in Python for rows of every length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.decoding import processors

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 5, (4, 9)).astype(np.int32)  # few ids, so that n-grams repeat
LOGITS = RNG.normal(size=(4, 7)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_a_token_that_would_repeat_an_ngram_is_forbidden(size: int) -> None:
    run = jax.jit(lambda length: processors.no_repeat_ngram(LOGITS, TOKENS, length, size))
    num_banned = 0
    for length in range(1, 10):
        expected = LOGITS.copy()
        for row, tokens in enumerate(TOKENS[:, :length].tolist()):
            seen = {tuple(tokens[i : i + size]) for i in range(length - size + 1)}
            for token in range(7):
                if (*tokens[length - size + 1 :], token)[-size:] in seen and length >= size:
                    expected[row, token] = -np.inf
                    num_banned += 1
        np.testing.assert_array_equal(run(length), expected)
    assert (num_banned > 0) == (size < 10)


def test_repetition_penalty_weakens_what_is_present_and_not_padding() -> None:
    padding = np.asarray([0, 2, 5, 0])
    run = jax.jit(
        lambda length, pads: processors.repetition_penalty(LOGITS, TOKENS, length, 1.5, pads)
    )
    for pads in (None, padding):
        expected = LOGITS.copy()
        for row, tokens in enumerate(TOKENS[:, :6]):
            for token in set(tokens[0 if pads is None else pads[row] :].tolist()):
                value = LOGITS[row, token]
                expected[row, token] = value * 1.5 if value < 0 else value / 1.5
        np.testing.assert_allclose(run(6, pads), expected, rtol=1e-6)


def test_padding_is_counted_from_the_left_and_never_past_a_row_without_tokens() -> None:
    mask = jnp.asarray([[1, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(processors.count_padding(mask), [0, 2, 1, 0])
    assert processors.count_padding(None) is None


def test_eos_waits_for_the_minimum_and_forced_tokens_stand_alone() -> None:
    early = np.asarray(processors.min_length(LOGITS, 3, 4, (1, 6)))
    np.testing.assert_array_equal(np.isneginf(early), [[0, 1, 0, 0, 0, 0, 1]] * 4)
    np.testing.assert_array_equal(processors.min_length(LOGITS, 4, 4, (1, 6)), LOGITS)
    only = np.asarray(processors.forced(LOGITS, True, (2,)))
    np.testing.assert_array_equal(np.exp(only), [[0, 0, 1, 0, 0, 0, 0]] * 4)
    np.testing.assert_array_equal(processors.forced(LOGITS, False, (2,)), LOGITS)
