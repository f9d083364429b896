"""Cluster-permuted masked language modelling: the pre-training data of the encoder-only VCC models.

Two layers. `cluster_weights`, `assemble_segments`, `choose_tokens` and `corrupt_tokens` are
deterministic: every random draw is an argument. `masked_lm_example` draws them from a
`numpy.random.Generator`. Plain, clustered and permuted MLM are the same code with
`clustered` or `permuted` switched off. The chosen tokens are the VIP tokens (p = 320 of 4,096).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxmodels.vcc.text_segments import select_segments

IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Settings of the objective; checked at construction. Ranges include both ends.

    Attributes:
      vocab_size: random replacement tokens are uniform over it.
      cls_id, sep_id, pad_id, mask_id, unk_id: special ids (RoBERTa: 0, 2, 1, 50264, 3).
      max_length: length of the assembled sequence.
      num_masked: tokens chosen in every sequence.
      clustered: weight the choice by a Gaussian mixture over the text instead of uniformly.
      permuted: cut the text into segments and shuffle them.
      segments: range of the target number of segments (one segment unless `permuted`).
      max_segments: hard limit, the size of the token-type table.
      clusters: range of the number of Gaussian clusters.
      sigma: range of their common standard deviation, in tokens.
    """

    vocab_size: int
    cls_id: int = 0
    sep_id: int = 2
    pad_id: int = 1
    mask_id: int = 50264
    unk_id: int = 3
    max_length: int = 4096
    num_masked: int = 320
    clustered: bool = True
    permuted: bool = True
    segments: tuple[int, int] = (8, 32)
    max_segments: int = 128
    clusters: tuple[int, int] = (4, 16)
    sigma: tuple[float, float] = (32.0, 64.0)

    def __post_init__(self) -> None:
        """Raise ValueError for ids outside the vocabulary, empty ranges or impossible lengths."""
        for name in ("cls_id", "sep_id", "pad_id", "mask_id", "unk_id"):
            value = getattr(self, name)
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} is {value}; give an id in [0, {self.vocab_size})")
        for name in ("segments", "clusters", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is ({low}, {high}); give 0 < low <= high")
        if self.segments[1] > self.max_segments:
            raise ValueError(
                f"segments go up to {self.segments[1]}, more than max_segments={self.max_segments}"
            )
        overhead = 2 * (self.segments[1] if self.permuted else 1)
        if not 0 < self.num_masked <= self.max_length - overhead:
            raise ValueError(
                f"num_masked is {self.num_masked}; with max_length {self.max_length} and {overhead}"
                f" special tokens give 1 to {self.max_length - overhead}"
            )

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never chosen for prediction."""
        return (self.cls_id, self.sep_id, self.pad_id, self.mask_id, self.unk_id)


def cluster_weights(length: int, centers: np.ndarray, sigma: float) -> np.ndarray:
    """Masking weight of every token, float32 [length].

    The mean over the clusters of exp(-(t - c)^2 / (2 sigma^2)), in text order.
    """
    position = np.arange(length, dtype=np.float64)[:, None]
    squared = (position - np.asarray(centers, np.float64)[None, :]) ** 2
    return np.exp(-squared / (2.0 * float(sigma) ** 2)).mean(axis=1).astype(np.float32)


def assemble_segments(
    segments: Sequence[Sequence[int]],
    weights: Sequence[np.ndarray],
    order: Sequence[int],
    settings: MaskedLM,
) -> dict[str, np.ndarray]:
    """Lay segments out in a given order, each as [CLS] segment [SEP] (deterministic).

    Args:
      segments: token ids of every segment, in text order.
      weights: masking weights of the same tokens, one array a segment.
      order: `order[i]` is the segment that comes i-th; its token type is i.
      settings: special ids and `max_length`; longer results are cut, shorter ones padded.

    Returns:
      Arrays [max_length]: sequence, special_tokens_mask, position_ids, token_type_ids,
      attention_mask (int32), masking_probs (float32, 0 at special tokens). Padding has position 0,
      type 0, attention 0 and counts as special.
    """
    tokens, types, probs = [], [], []
    for index, source in enumerate(order):
        wrapped = [settings.cls_id, *segments[source], settings.sep_id]
        tokens.append(np.asarray(wrapped, np.int32))
        types.append(np.full(len(wrapped), index, np.int32))
        probs.append(np.pad(np.asarray(weights[source], np.float32), 1))
    length = min(sum(map(len, tokens)), settings.max_length)

    def padded(parts: Sequence[np.ndarray], fill: int) -> np.ndarray:
        whole = np.concatenate(parts)[:length]
        return np.pad(whole, (0, settings.max_length - length), constant_values=fill)

    sequence = padded(tokens, settings.pad_id)
    attention = padded([np.ones(length, np.int32)], 0)
    return {
        "sequence": sequence,
        "special_tokens_mask": np.isin(sequence, settings.special_ids).astype(np.int32),
        "position_ids": padded([np.arange(length, dtype=np.int32)], 0),
        "token_type_ids": padded(types, 0),
        "attention_mask": attention,
        "masking_probs": padded(probs, 0),
    }


def choose_tokens(
    masking_probs: np.ndarray,
    special_tokens_mask: np.ndarray,
    gumbel_uniform: np.ndarray,
    num_masked: int,
) -> np.ndarray:
    """Exactly `num_masked` positions by Gumbel top-k, int32 [num_masked] ascending.

    Scores are log(weight + 1e-6) - log(-log(u)) - 1000 * special: a sample without replacement in
    proportion to the weights. Special tokens come last, after every ordinary one.
    """
    uniform = np.clip(np.asarray(gumbel_uniform, np.float64), 1e-30, 1.0 - 1e-16)
    scores = np.log(np.asarray(masking_probs, np.float64) + 1e-6) - np.log(-np.log(uniform))
    scores = scores - 1000.0 * np.asarray(special_tokens_mask)
    if num_masked > scores.size:
        raise ValueError(f"cannot choose {num_masked} of {scores.size} tokens")
    return np.sort(np.argsort(-scores, kind="stable")[:num_masked]).astype(np.int32)


def corrupt_tokens(
    sequence: np.ndarray,
    chosen: np.ndarray,
    special_tokens_mask: np.ndarray,
    uniforms: tuple[np.ndarray, np.ndarray],
    random_words: np.ndarray,
    mask_id: int,
) -> dict[str, np.ndarray]:
    """80/10/10 corruption of the chosen tokens (deterministic).

    Args:
      sequence: [length] token ids.
      chosen: [num_masked] positions, from `choose_tokens`.
      special_tokens_mask: [length]; a special token that had to be chosen because the text is too
        short stays as it is: no label, never VIP.
      uniforms: two arrays [length] in [0, 1): below 0.8 in the first the token becomes the mask
        token; otherwise, below 0.5 in the second, it becomes `random_words`; otherwise it stays.
      random_words: [length] replacement ids.
      mask_id: id of the mask token.

    Returns:
      int32 arrays: input_ids, labels (-100 where nothing is predicted), importance_mask (VIP)
      [length] and masked_token_indices [num_masked].
    """
    vip = np.zeros(len(sequence), bool)
    vip[chosen] = True
    vip &= np.asarray(special_tokens_mask) == 0
    masked = vip & (np.asarray(uniforms[0]) < 0.8)
    replaced = vip & ~masked & (np.asarray(uniforms[1]) < 0.5)
    ids = np.where(masked, mask_id, np.where(replaced, random_words, sequence))
    return {
        "input_ids": ids.astype(np.int32),
        "labels": np.where(vip, sequence, IGNORED_LABEL).astype(np.int32),
        "importance_mask": vip.astype(np.int32),
        "masked_token_indices": np.asarray(chosen, np.int32),
    }


def draw_segments(
    rng: np.random.Generator,
    text: str,
    encode: Callable[[str], Sequence[int]],
    settings: MaskedLM,
) -> list[list[int]]:
    """Draw the segments of one text: their number, the range of sentences and the break points."""
    low, high = settings.segments if settings.permuted else (1, 1)
    target = int(rng.integers(low, high + 1))
    starts = (float(rng.random()), float(rng.random()))
    breaks = rng.random(high).tolist()
    limit = settings.max_segments if settings.permuted else 1
    budget = settings.max_length - 2 * target
    return select_segments(text, encode, budget, target, starts, breaks, limit)


def draw_weights(rng: np.random.Generator, length: int, settings: MaskedLM) -> np.ndarray:
    """Draw masking weights [length]: a Gaussian mixture, or ones unless `clustered`."""
    if not settings.clustered:
        return np.ones(length, np.float32)
    clusters = int(rng.integers(settings.clusters[0], settings.clusters[1] + 1))
    sigma = float(rng.uniform(*settings.sigma))
    return cluster_weights(length, rng.integers(length, size=clusters), sigma)


def masked_lm_example(
    rng: np.random.Generator,
    text: str,
    encode: Callable[[str], Sequence[int]],
    settings: MaskedLM,
) -> dict[str, np.ndarray]:
    """One training example, all randomness from `rng` (equal generators, equal examples).

    Args:
      rng: source of all draws.
      text: packed text: sentences separated by `</s>`, documents by `</s></s>`.
      encode: tokenizer of one sentence, without special tokens.
      settings: which objective, and its sizes.

    Returns:
      int32 arrays: input_ids, labels, position_ids, token_type_ids, attention_mask,
      importance_mask [max_length]; masked_token_indices [num_masked].

    Raises:
      ValueError: the text has no sentence, or the tokenizer gives no token.
    """
    segments = draw_segments(rng, text, encode, settings)
    edges = np.cumsum([len(segment) for segment in segments])
    weights = np.split(draw_weights(rng, int(edges[-1]), settings), edges[:-1])
    order = rng.permutation(len(segments)) if settings.permuted else np.arange(len(segments))
    parts = assemble_segments(segments, weights, order, settings)
    length, special = settings.max_length, parts["special_tokens_mask"]
    chosen = choose_tokens(parts["masking_probs"], special, rng.random(length), settings.num_masked)
    uniforms = (rng.random(length), rng.random(length))
    words = rng.integers(settings.vocab_size, size=length)
    corrupted = corrupt_tokens(
        parts["sequence"], chosen, special, uniforms, words, settings.mask_id
    )
    kept = ("position_ids", "token_type_ids", "attention_mask")
    return corrupted | {name: parts[name] for name in kept}
