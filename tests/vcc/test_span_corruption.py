"""Span corruption: sizes, masks and corrupted batches, by hand-computed values and properties."""

import dataclasses

import numpy as np
import pytest

from jaxmodels.vcc.span_corruption import (
    SpanCorruption,
    corrupt_spans,
    draw_noise_mask,
    interleave_spans,
    sentinel_ids,
    span_corruption_batch,
    span_lengths,
)

SMALL = SpanCorruption(vocab_size=100, inputs_length=24, noise_density=0.3, vip_threshold=80)


def test_published_pretraining_sizes() -> None:
    sizes = span_lengths(4096, 0.148, 3.0)
    assert dataclasses.astuple(sizes) == (4544, 898, 673, 224)
    assert dataclasses.astuple(span_lengths(1024, 0.5, 3.0)) == (1534, 1024, 767, 256)


@pytest.mark.parametrize("length", [8, 57, 200, 512])
@pytest.mark.parametrize("density", [0.1, 0.15, 0.4])
def test_raw_length_is_the_longest_that_fits(length: int, density: float) -> None:
    sizes = span_lengths(length, density, 3.0)
    kept = sizes.raw_tokens_length - sizes.num_noise_tokens
    assert kept + sizes.num_spans + 1 <= length
    assert sizes.targets_length == sizes.num_noise_tokens + sizes.num_spans + 1


def test_corruption_of_one_row_by_hand() -> None:
    tokens = np.array([[10, 11, 12, 13, 14, 15, 16, 0]])
    mask = np.array([[0, 1, 1, 0, 0, 1, 0, 1]])
    assert sentinel_ids(mask, 100).tolist() == [[0, 98, -1, 0, 0, 97, 0, 96]]
    batch = corrupt_spans(tokens, mask, SMALL)
    assert batch["input_ids"].tolist() == [[10, 98, 13, 14, 97, 16, 96, 1]]
    assert batch["importance_mask"].tolist() == [[0, 1, 0, 0, 1, 0, 1, 0]]
    # label sentinels count the kept spans: 10 | 13 14 | 16
    assert batch["labels"].tolist() == [[98, 11, 12, 97, 15, 96, -100, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 98, 11, 12, 97, 15, 96, 0]]
    kept = corrupt_spans(tokens, mask, dataclasses.replace(SMALL, ignore_padding=False))
    assert kept["labels"].tolist() == [[98, 11, 12, 97, 15, 96, 0, 1]]


def test_padding_is_not_attended() -> None:
    batch = corrupt_spans(np.array([[9, 8, 0, 0]]), np.array([[0, 1, 0, 0]]), SMALL)
    assert batch["input_ids"].tolist() == [[9, 98, 0, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 1]]


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many tokens"):
        corrupt_spans(np.ones((2, 4), int), np.array([[0, 1, 0, 0], [0, 1, 1, 0]]), SMALL)
    with pytest.raises(ValueError, match="both be"):
        corrupt_spans(np.ones((2, 4), int), np.ones((2, 5), int), SMALL)


def test_drawn_masks_have_exact_counts_and_start_with_kept_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = draw_noise_mask(rng, 101, 0.2, 3.0)
        assert mask.sum() == 20 and not mask[0] and mask[-1]
        assert (np.diff(mask.astype(int)) == 1).sum() == 7
    assert interleave_spans([2, 1], [1, 3]).astype(int).tolist() == [0, 0, 1, 0, 1, 1, 1]


def test_drawn_masks_cover_every_position_but_the_first() -> None:
    rng = np.random.default_rng(1)
    share = np.mean([draw_noise_mask(rng, 40, 0.25, 2.0) for _ in range(400)], axis=0)
    assert share[0] == 0 and share[1:].min() > 0.02


def test_batches_are_reproducible_static_and_invertible() -> None:
    documents = [list(range(2, 70)), list(range(2, 9))]
    batch = span_corruption_batch(np.random.default_rng(3), documents, SMALL)
    again = span_corruption_batch(np.random.default_rng(3), documents, SMALL)
    sizes = SMALL.lengths
    for name, array in batch.items():
        np.testing.assert_array_equal(array, again[name])
        assert array.dtype == np.int32
    assert batch["input_ids"].shape == (2, 24)
    assert batch["labels"].shape == (2, sizes.targets_length)
    assert batch["importance_mask"].sum(axis=1).tolist() == [sizes.num_spans] * 2
    # Kept text and noise of the long document together are one window of it.
    pieces = np.concatenate([batch["input_ids"][0], batch["labels"][0]])
    pieces = np.sort(pieces[(pieces > 1) & (pieces < 80)])
    np.testing.assert_array_equal(np.diff(pieces), 1)
    assert len(pieces) == sizes.raw_tokens_length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_density": 1.0}, "noise_density"),
        ({"mean_span_length": 0.5}, "mean_span_length"),
        ({"inputs_length": 3}, "inputs_length"),
        ({"vocab_size": 3}, "vocab_size"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_threshold_that_misses_sentinels_is_refused() -> None:
    with pytest.raises(ValueError, match="vip_threshold"):
        span_corruption_batch(
            np.random.default_rng(0), [[5]], dataclasses.replace(SMALL, vip_threshold=98)
        )
