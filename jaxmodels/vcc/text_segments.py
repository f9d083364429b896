"""Choosing and cutting the text that the segment-permuting pre-training objectives work on.

A packed text holds documents separated by a doubled end-of-sequence mark and sentences separated
by a single one. `select_segments` keeps a range of sentences that fits a token budget and cuts it
into segments at document boundaries and at given break points (specification of VCC, section 5).
"""

from collections.abc import Callable, Sequence

import numpy as np

Tokens = list[int]


def split_sentences(text: str, eos: str = "</s>") -> tuple[list[str], list[int]]:
    """Sentences of a packed text, and for each the index of its document (non-decreasing)."""
    sentences: list[str] = []
    documents: list[int] = []
    for index, document in enumerate(text.split(eos + eos)):
        for sentence in document.split(eos):
            if sentence.strip():
                sentences.append(sentence.strip())
                documents.append(index)
    return sentences, documents


def sentence_range(
    lengths: Sequence[int], budget: int, start_draw: float, fill: bool
) -> tuple[int, int]:
    """Range [start, stop) of sentences that uses a budget.

    Args:
      lengths: length of every sentence.
      budget: wanted total length.
      start_draw: uniform number in [0, 1) that picks the start among all starts whose suffix
        still reaches the budget (the first sentence when none does).
      fill: keep the sentence that crosses the budget (True) or stop before it (False; a single
        sentence longer than the budget is kept, to be cut by the caller).
    """
    suffix = np.cumsum(np.asarray(lengths)[::-1])[::-1]
    start = int(start_draw * max(int((suffix >= budget).sum()), 1))
    total = np.cumsum(lengths[start:])
    fitting = int((total <= budget).sum())
    if fill and fitting and total[fitting - 1] == budget:
        return start, start + fitting
    stop = start + fitting + int(fill or fitting == 0)
    return start, min(stop, len(lengths))


def segment_breaks(
    lengths: Sequence[int],
    documents: Sequence[int],
    target: int,
    break_draws: Sequence[float],
    max_segments: int,
) -> list[int]:
    """Sentence indices where a new segment begins.

    Document boundaries always break. If that leaves fewer than `target` segments, each missing one
    takes a uniform position of the text (`break_draws`, in [0, 1)), moved to the end of the
    sentence it falls into; coinciding breaks count once. At most `max_segments - 1` breaks stay.
    """
    changes = np.flatnonzero(np.diff(np.asarray(documents, np.int64))) + 1
    breaks = set(changes.tolist())
    ends = np.cumsum(lengths)
    for draw in list(break_draws)[: max(target - 1 - len(breaks), 0)]:
        position = int(draw * ends[-1])
        index = int(np.searchsorted(ends, position, side="right")) + 1
        if index < len(lengths):
            breaks.add(index)
    return sorted(breaks)[: max_segments - 1]


def select_segments(
    text: str,
    encode: Callable[[str], Sequence[int]],
    budget: int,
    target: int,
    start_draws: tuple[float, float],
    break_draws: Sequence[float],
    max_segments: int = 128,
) -> list[Tokens]:
    """Segments (token ids, in text order) of a packed text, from given random draws.

    Args:
      text: documents joined by a doubled, sentences by a single `</s>`.
      encode: tokenizer of one sentence, without special tokens.
      budget: largest total number of tokens.
      target: wanted number of segments.
      start_draws: uniform numbers for the first truncation (by words, which bounds the cost of
        tokenizing) and the second (by tokens).
      break_draws: at least `target - 1` uniform numbers.
      max_segments: hard limit, the size of the token-type table.

    Raises:
      ValueError: the text holds no sentence.
    """
    sentences, documents = split_sentences(text)
    if not sentences:
        raise ValueError("the text holds no sentence: drop empty texts before this objective")
    words = [len(sentence.split()) for sentence in sentences]
    start, stop = sentence_range(words, budget, start_draws[0], fill=True)
    pairs = [
        (list(encode(sentence)), document)
        for sentence, document in zip(sentences[start:stop], documents[start:stop], strict=True)
    ]
    pairs = [(tokens, document) for tokens, document in pairs if tokens]
    if not pairs:
        raise ValueError("the tokenizer gave no token for the chosen sentences")
    start, stop = sentence_range([len(t) for t, _ in pairs], budget, start_draws[1], fill=False)
    tokens = [t[:budget] for t, _ in pairs[start:stop]]
    breaks = segment_breaks(
        [len(t) for t in tokens],
        [document for _, document in pairs[start:stop]],
        target,
        break_draws,
        max_segments,
    )
    edges = [0, *breaks, len(tokens)]
    return [sum(tokens[a:b], []) for a, b in zip(edges[:-1], edges[1:], strict=True)]
