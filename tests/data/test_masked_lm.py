"""Masking for masked-language models."""

import numpy as np
import pytest

from jaxmodels.data.masked_lm import IGNORED, MaskTokens

LENGTH = 4000


def record() -> dict[str, np.ndarray]:
    ids = np.arange(LENGTH) % 95 + 5
    ids[0], ids[-500:] = 0, 1
    return {"input_ids": ids, "attention_mask": np.arange(LENGTH) < LENGTH - 500}


def test_labels_are_the_hidden_tokens_and_all_else_is_untouched() -> None:
    before = record()
    after = MaskTokens(1000, 100)(before, np.random.default_rng(0))
    chosen = after["labels"] != IGNORED
    assert chosen.sum() == 1000
    np.testing.assert_array_equal(after["labels"][chosen], before["input_ids"][chosen])
    np.testing.assert_array_equal(after["input_ids"][~chosen], before["input_ids"][~chosen])


def test_special_tokens_and_padding_are_never_chosen() -> None:
    after = MaskTokens(LENGTH, 100)(record(), np.random.default_rng(0))
    chosen = np.flatnonzero(after["labels"] != IGNORED)
    assert chosen.min() == 1 and chosen.max() == LENGTH - 501 and len(chosen) == LENGTH - 501


def test_eight_of_ten_are_masked_and_one_is_random() -> None:
    before = record()
    after = MaskTokens(3000, 100)(before, np.random.default_rng(0))
    chosen = after["labels"] != IGNORED
    masked = after["input_ids"][chosen] == 4
    kept = after["input_ids"][chosen] == before["input_ids"][chosen]
    assert (after["input_ids"][chosen][~masked] >= 5).all()
    # Three standard deviations of the share of 3000 draws; one random token in 95 is the same.
    assert abs(masked.mean() - 0.8) < 3 * np.sqrt(0.16 / 3000)
    assert abs(kept.mean() - (0.1 + 0.1 / 95)) < 3 * np.sqrt(0.09 / 3000)


def test_draws_depend_on_the_generator_alone() -> None:
    mask = MaskTokens(100, 100)
    first, same, other = (mask(record(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["labels"], same["labels"])
    assert (first["labels"] != other["labels"]).any()


@pytest.mark.parametrize(("masked", "size"), [(0, 100), (1, 5)])
def test_sizes_that_leave_nothing_to_choose_are_refused(masked: int, size: int) -> None:
    with pytest.raises(ValueError, match="num_masked=0|vocab_size=5"):
        MaskTokens(masked, size)
