"""Masked-LM objectives with clusters and permuted segments: choice of text, layout, corruption."""

import dataclasses

import numpy as np
import pytest

from jaxmodels.vcc.permuted_mlm import (
    MaskedLM,
    assemble_segments,
    choose_tokens,
    cluster_weights,
    corrupt_tokens,
    masked_lm_example,
)
from jaxmodels.vcc.text_segments import (
    segment_breaks,
    select_segments,
    sentence_range,
    split_sentences,
)

SETTINGS = MaskedLM(
    vocab_size=200, mask_id=4, max_length=96, num_masked=12, segments=(3, 5), clusters=(2, 4),
    sigma=(3.0, 6.0),
)  # fmt: skip
WORDS = [f"w{i}" for i in range(150)]
TEXT = "</s></s>".join(
    "</s>".join(" ".join(WORDS[a : a + 5]) for a in range(start, start + 50, 5))
    for start in (0, 50, 100)
)


def encode(sentence: str) -> list[int]:
    """One id a word: `w7` is 17."""
    return [int(word[1:]) + 10 for word in sentence.split()]


def test_sentences_know_their_document() -> None:
    sentences, documents = split_sentences("a b</s>c</s></s>d</s>")
    assert sentences == ["a b", "c", "d"]
    assert documents == [0, 0, 1]


@pytest.mark.parametrize(
    ("draw", "fill", "wanted"),
    [(0.0, False, (0, 2)), (0.0, True, (0, 3)), (0.99, False, (2, 3)), (0.99, True, (2, 4))],
)
def test_range_starts_where_the_rest_fills_the_budget(
    draw: float, fill: bool, wanted: tuple[int, int]
) -> None:
    # suffix sums 19, 15, 11, 5: starts 0, 1 and 2 still reach the budget of 9
    assert sentence_range([4, 4, 6, 5], 9, draw, fill) == wanted


def test_text_shorter_than_the_budget_is_kept_whole() -> None:
    assert sentence_range([4, 4], 100, 0.7, False) == (0, 2)
    assert sentence_range([50], 9, 0.7, False) == (0, 1)


def test_breaks_are_document_ends_then_random_sentence_ends() -> None:
    lengths, documents = [2, 2, 2, 2, 2], [0, 0, 1, 1, 1]
    assert segment_breaks(lengths, documents, 1, [], 128) == [2]
    # position 6 of 10 lies in sentence 3, whose end begins sentence 4
    assert segment_breaks(lengths, documents, 3, [0.6, 0.1], 128) == [2, 4]
    assert segment_breaks(lengths, documents, 3, [0.95], 128) == [2]
    assert segment_breaks(lengths, [0, 1, 2, 3, 4], 1, [], 3) == [1, 2]


def test_segments_are_consecutive_text_within_the_budget() -> None:
    segments = select_segments(TEXT, encode, 60, 6, (0.5, 0.5), np.linspace(0.1, 0.9, 9).tolist())
    flat = sum(segments, [])
    assert len(flat) <= 60 and len(segments) >= 4
    np.testing.assert_array_equal(np.diff(flat), 1)


def test_empty_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="no sentence"):
        select_segments("</s></s> ", encode, 60, 3, (0.0, 0.0), [0.1, 0.2])


def test_weights_are_the_mean_of_gaussians() -> None:
    weights = cluster_weights(5, np.array([1.0, 3.0]), 2.0)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[1], (1.0 + np.exp(-0.5)) / 2, rtol=1e-6)


def test_segments_are_laid_out_in_the_new_order() -> None:
    settings = dataclasses.replace(SETTINGS, max_length=12, num_masked=1, segments=(2, 2))
    weights = [np.array([0.1, 0.2]), np.array([0.3])]
    parts = assemble_segments([[20, 21], [30]], weights, [1, 0], settings)
    assert parts["sequence"].tolist() == [0, 30, 2, 0, 20, 21, 2, 1, 1, 1, 1, 1]
    assert parts["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert parts["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0]
    assert parts["attention_mask"].sum() == 7
    assert parts["special_tokens_mask"].tolist() == [1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(parts["masking_probs"][:7], [0, 0.3, 0, 0, 0.1, 0.2, 0], rtol=1e-6)


def test_too_long_text_is_cut() -> None:
    settings = dataclasses.replace(SETTINGS, max_length=8, num_masked=1, segments=(1, 1))
    parts = assemble_segments([list(range(20, 40))], [np.ones(20)], [0], settings)
    assert parts["sequence"].tolist() == [0, *range(20, 27)]


def test_choice_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 3.0, 0.0, 1.0])
    special = np.array([0, 0, 1, 0])
    hits = np.zeros(4)
    for _ in range(2000):
        hits[choose_tokens(weights, special, rng.random(4), 1)] += 1
    np.testing.assert_allclose(hits / 2000, [0.2, 0.6, 0.0, 0.2], atol=0.04)


def test_special_tokens_are_never_predicted_even_when_text_runs_out() -> None:
    special = np.array([1, 0, 0, 1, 1])
    chosen = choose_tokens(np.ones(5), special, np.full(5, 0.5), 4)
    assert {1, 2} <= set(chosen.tolist())
    out = corrupt_tokens(
        np.array([0, 7, 8, 2, 1]), chosen, special, (np.zeros(5), np.zeros(5)), np.full(5, 9), 4
    )
    assert out["input_ids"].tolist() == [0, 4, 4, 2, 1]
    assert out["labels"].tolist() == [-100, 7, 8, -100, -100]
    assert out["importance_mask"].tolist() == [0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="cannot choose"):
        choose_tokens(np.ones(5), special, np.full(5, 0.5), 6)


def test_corruption_is_mask_random_or_kept() -> None:
    first, second = np.array([0.1, 0.9, 0.9, 0.1]), np.array([0.1, 0.1, 0.9, 0.1])
    out = corrupt_tokens(
        np.array([7, 8, 9, 10]), np.array([0, 1, 2]), np.zeros(4), (first, second), np.full(4, 5), 4
    )
    assert out["input_ids"].tolist() == [4, 5, 9, 10]
    assert out["labels"].tolist() == [7, 8, 9, -100]


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_examples_are_complete_and_reproducible(clustered: bool, permuted: bool) -> None:
    settings = dataclasses.replace(SETTINGS, clustered=clustered, permuted=permuted)
    example = masked_lm_example(np.random.default_rng(5), TEXT, encode, settings)
    again = masked_lm_example(np.random.default_rng(5), TEXT, encode, settings)
    for name, array in example.items():
        np.testing.assert_array_equal(array, again[name])
        assert array.dtype == np.int32
        assert array.shape == ((12,) if name == "masked_token_indices" else (96,))
    chosen = example["masked_token_indices"]
    assert example["importance_mask"].sum() == 12
    assert (example["labels"][chosen] >= 10).all()
    original = np.where(example["labels"] >= 0, example["labels"], example["input_ids"])
    types = example["token_type_ids"][example["attention_mask"] == 1]
    assert (types.max() > 0) == permuted
    for index in range(types.max() + 1):
        body = original[: len(types)][types == index]
        assert body[0] == 0 and body[-1] == 2
        np.testing.assert_array_equal(np.diff(body[1:-1]), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_id": 200}, "mask_id"),
        ({"sigma": (4.0, 3.0)}, "sigma"),
        ({"num_masked": 90}, "num_masked"),
        ({"segments": (8, 200)}, "max_segments"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)
