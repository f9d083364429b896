"""T5 span corruption with VIP marks: the pre-training data of the sequence-to-sequence VCC models.

Two layers. `corrupt_spans` is deterministic: token ids and a noise mask in, model inputs out.
`span_corruption_batch` draws windows and masks from a `numpy.random.Generator` and calls it.
Every noise span becomes one sentinel in the encoder input, and these sentinels are the VIP tokens
(specification of VCC, section 5: 4,096 inputs at density 0.148 hold 224 spans, hence p = 224).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True)
class SpanLengths:
    """Sizes that follow from the wanted encoder length.

    Attributes:
      raw_tokens_length: tokens of raw text that corrupt to the wanted encoder length.
      targets_length: length of the labels, end-of-sequence included.
      num_noise_tokens: tokens replaced by sentinels.
      num_spans: noise spans, which is also the number of VIP tokens.
    """

    raw_tokens_length: int
    targets_length: int
    num_noise_tokens: int
    num_spans: int


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Settings of the objective; checked at construction.

    Attributes:
      vocab_size: size V of the vocabulary with its sentinels; span j (from 1) is written V-1-j.
      inputs_length: length of the encoder input, end-of-sequence included.
      noise_density: share of the raw tokens that is replaced, between 0 and 1 exclusive.
      mean_span_length: mean length of a replaced span, in tokens.
      vip_threshold: ids from here on are VIP; None means `vocab_size - 5000`.
      eos_id, pad_id, decoder_start_id: special ids (T5: 1, 0, 0).
      ignore_padding: padding inside a noise span gets the label -100 instead of `pad_id`.
    """

    vocab_size: int
    inputs_length: int = 4096
    noise_density: float = 0.148
    mean_span_length: float = 3.0
    vip_threshold: int | None = None
    eos_id: int = 1
    pad_id: int = 0
    decoder_start_id: int = 0
    ignore_padding: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a density, span length or vocabulary that cannot work."""
        if not 0.0 < self.noise_density < 1.0:
            raise ValueError(f"noise_density is {self.noise_density}; give a number in (0, 1)")
        if self.mean_span_length < 1.0:
            raise ValueError(f"mean_span_length is {self.mean_span_length}; give at least 1")
        if self.lengths.num_spans >= self.vocab_size - 1:
            raise ValueError(
                f"{self.lengths.num_spans} spans need as many sentinels, but vocab_size is only "
                f"{self.vocab_size}"
            )

    @property
    def lengths(self) -> SpanLengths:
        """Raw length, target length, noise tokens and spans of these settings."""
        return span_lengths(self.inputs_length, self.noise_density, self.mean_span_length)

    @property
    def first_vip_id(self) -> int:
        """Lowest id that counts as a VIP token."""
        return self.vocab_size - 5000 if self.vip_threshold is None else self.vip_threshold


def noise_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Number of (noise tokens, noise spans) in `length` raw tokens; at least one of each."""
    noise = min(max(int(round(length * noise_density)), 1), length - 1)
    spans = max(int(round(noise / mean_span_length)), 1)
    return noise, min(spans, noise, length - noise)


@functools.lru_cache(maxsize=64)
def span_lengths(inputs_length: int, noise_density: float, mean_span_length: float) -> SpanLengths:
    """Longest raw text whose corrupted form fits `inputs_length`, and the sizes it implies.

    Raises:
      ValueError: `inputs_length` is too short to hold one span and the end-of-sequence token.
    """
    if inputs_length < 4:
        raise ValueError(f"inputs_length is {inputs_length}; span corruption needs at least 4")

    def corrupted(length: int) -> tuple[int, int]:
        noise, spans = noise_counts(length, noise_density, mean_span_length)
        return length - noise + spans + 1, noise + spans + 1

    raw = inputs_length if corrupted(inputs_length)[0] <= inputs_length else 2
    while corrupted(raw + 1)[0] <= inputs_length:
        raw += 1
    if noise_density == 0.5 and corrupted(raw)[1] > corrupted(raw)[0]:
        raw -= 1  # T5 keeps the two sides equally long at one half
    noise, spans = noise_counts(raw, noise_density, mean_span_length)
    return SpanLengths(raw, corrupted(raw)[1], noise, spans)


def interleave_spans(kept_lengths: Sequence[int], noise_lengths: Sequence[int]) -> np.ndarray:
    """Noise mask [length] (bool) of alternating spans, kept text first."""
    lengths = np.stack([np.asarray(kept_lengths), np.asarray(noise_lengths)], axis=1).reshape(-1)
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths)


def draw_noise_mask(
    rng: np.random.Generator, length: int, noise_density: float, mean_span_length: float
) -> np.ndarray:
    """T5's random spans noise mask [length] (bool): uniform over the compositions of both parts."""
    noise, spans = noise_counts(length, noise_density, mean_span_length)

    def composition(total: int) -> np.ndarray:
        cuts = np.sort(rng.choice(total - 1, size=spans - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    return interleave_spans(composition(length - noise), composition(noise))


def sentinel_ids(noise_mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """Sentinels [batch, length]: V-1-j where span j starts, -1 inside a span, 0 elsewhere."""
    mask = np.asarray(noise_mask, np.int64)
    previous = np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    start = mask * (1 - previous)
    numbered = np.where(start == 1, vocab_size - 1 - np.cumsum(start, axis=1), 0)
    return np.where(mask > start, -1, numbered).astype(np.int32)


def _replace_spans(tokens: np.ndarray, sentinels: np.ndarray, eos_id: int) -> np.ndarray:
    """Put the sentinels in, drop the rest of their spans, append end-of-sequence."""
    full = np.where(sentinels != 0, sentinels, tokens)
    kept = (full >= 0).sum(axis=1)
    if (kept != kept[0]).any():
        raise ValueError(
            f"rows of one batch must keep equally many tokens, got {kept.tolist()}: "
            "draw all noise masks with the same number of noise tokens and spans"
        )
    rows = full[full >= 0].reshape(len(full), -1)
    return np.concatenate([rows, np.full((len(rows), 1), eos_id)], axis=1).astype(np.int32)


def corrupt_spans(
    token_ids: np.ndarray, noise_mask: np.ndarray, settings: SpanCorruption
) -> dict[str, np.ndarray]:
    """Apply given noise masks to given tokens (deterministic).

    Args:
      token_ids: [batch, raw_length] int, padded at the right with `pad_id`.
      noise_mask: [batch, raw_length] 0/1 or bool, 1 = replaced.
      settings: vocabulary and special ids; its lengths are not used here.

    Returns:
      int32 arrays: input_ids, attention_mask, importance_mask [batch, inputs_length]; labels,
      decoder_input_ids [batch, targets_length]. Sentinels of both sides are numbered
      independently; labels that would be padding are -100.

    Raises:
      ValueError: shapes differ, or the masks do not give rows of one length.
    """
    tokens, mask = np.asarray(token_ids), np.asarray(noise_mask).astype(bool)
    if tokens.ndim != 2 or tokens.shape != mask.shape:
        raise ValueError(
            f"token_ids {tokens.shape} and noise_mask {mask.shape} must both be [batch, length]"
        )
    size, eos = settings.vocab_size, settings.eos_id
    input_ids = _replace_spans(tokens, sentinel_ids(mask, size), eos)
    labels = _replace_spans(tokens, sentinel_ids(~mask, size), eos)
    shifted = np.pad(labels, ((0, 0), (1, 0)), constant_values=settings.decoder_start_id)[:, :-1]
    if settings.ignore_padding:
        labels = np.where(labels == settings.pad_id, IGNORED_LABEL, labels)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != settings.pad_id).astype(np.int32),
        "importance_mask": (input_ids >= settings.first_vip_id).astype(np.int32),
        "labels": labels.astype(np.int32),
        "decoder_input_ids": shifted.astype(np.int32),
    }


def span_corruption_batch(
    rng: np.random.Generator, documents: Sequence[Sequence[int]], settings: SpanCorruption
) -> dict[str, np.ndarray]:
    """Draw a window and a noise mask for every document and corrupt them.

    Args:
      rng: the only source of randomness; equal generators give equal batches.
      documents: token ids of each text; long ones give a uniform random window, short ones are
        padded at the right.
      settings: lengths, density and ids.

    Returns:
      As `corrupt_spans`.

    Raises:
      ValueError: the VIP threshold leaves a sentinel out or takes every token in.
    """
    lowest = settings.vocab_size - 1 - settings.lengths.num_spans
    if not 0 < settings.first_vip_id <= lowest:
        raise ValueError(
            f"sentinels take ids {lowest} to {settings.vocab_size - 2}, but ids are VIP from "
            f"{settings.first_vip_id} on: choose vip_threshold between 1 and {lowest}"
        )
    length = settings.lengths.raw_tokens_length
    tokens = np.full((len(documents), length), settings.pad_id, np.int64)
    masks = np.zeros(tokens.shape, bool)
    for row, document in enumerate(documents):
        start = int(rng.integers(max(len(document) - length, 0) + 1))
        window = np.asarray(document[start : start + length])
        tokens[row, : len(window)] = window
        masks[row] = draw_noise_mask(rng, length, settings.noise_density, settings.mean_span_length)
    return corrupt_spans(tokens, masks, settings)
