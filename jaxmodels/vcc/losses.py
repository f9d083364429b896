"""Losses and metrics of the VCC tasks as (sum, weight) pairs, which add up exactly over batches.

Labels of -100 do not count. `mean` divides like the official code, by weight + 1e-6.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.core.losses import IGNORE, Pair, cross_entropy
from jaxmodels.vcc.heads import HotpotQALogits

COUNT_EPS = 1e-6


def mean(pair: Pair) -> jax.Array:
    """Returns sum / (weight + 1e-6), the official way to divide."""
    return pair[0] / (pair[1] + COUNT_EPS)


def multiple_choice(scores: jax.Array, valid: jax.Array, answers: jax.Array) -> dict[str, Pair]:
    """Cross-entropy over candidates (WikiHop, QuALITY).

    Args:
      scores: [B, c].
      valid: [B, c], 1 on real candidates; the others get -1000.
      answers: [B] int.
    """
    return cross_entropy(scores - 1000.0 * (1.0 - valid.astype(jnp.float32)), answers)


def binary_f1(predicted: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns F1 of class 1 over the labels that count, with the official 1e-6 in each ratio."""
    counted = labels != IGNORE
    hit = (counted & (predicted == 1) & (labels == 1)).sum()
    precision = hit / ((counted & (predicted == 1)).sum() + COUNT_EPS)
    recall = hit / ((counted & (labels == 1)).sum() + COUNT_EPS)
    return 2 * precision * recall / (precision + recall + COUNT_EPS)


def span_logits(logits: HotpotQALogits, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns start and end logits [B, n] with -1e5 added on padding; mask is [B, n]."""
    padding = -1e5 * (1.0 - mask.astype(jnp.float32))
    return logits.span[..., 0] + padding, logits.span[..., 1] + padding


def best_span(start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the span start <= end with the largest sum: logits [B, n] -> two [B] int32.

    The best partner of every end is a running maximum, so that no [n, n] grid is made.
    """
    positions = jnp.broadcast_to(jnp.arange(start.shape[1]), start.shape)

    def later_if_better(a: Pair, b: Pair) -> Pair:
        better = b[0] > a[0]
        return jnp.where(better, b[0], a[0]), jnp.where(better, b[1], a[1])

    best, where = jax.lax.associative_scan(later_if_better, (start, positions), axis=1)
    last = (best + end).argmax(axis=1)
    first = jnp.take_along_axis(where, last[:, None], axis=1)[:, 0]
    return first.astype(jnp.int32), last.astype(jnp.int32)


def hotpotqa(
    logits: HotpotQALogits, mask: jax.Array, labels: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, Pair]]:
    """Multi-task loss: (start + end) / 2 + type + sentence + paragraph.

    Args:
      logits: of the heads.
      mask: [B, n], 1 on real tokens.
      labels: `paragraph_positions`, `paragraph_labels` [B, a]; `sentence_positions`,
        `sentence_labels` [B, s]; `answer_type` [B]; `start`, `end` [B, o] token indices of the
        answer's occurrences, -100 where there is none: only the first counts.

    Returns:
      the loss, and (sum, weight) pairs named `<part>_loss`, `<part>_accuracy`.
    """
    start, end = span_logits(logits, mask)

    def at(x: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, positions[..., None], axis=1)

    parts = {
        "paragraph": (at(logits.paragraph, labels["paragraph_positions"]), "paragraph_labels"),
        "sentence": (at(logits.sentence, labels["sentence_positions"]), "sentence_labels"),
    }
    pairs = {name: cross_entropy(x, labels[key]) for name, (x, key) in parts.items()}
    pairs["answer_type"] = cross_entropy(logits.answer_type, labels["answer_type"])
    pairs["start"] = cross_entropy(start, labels["start"][:, 0])
    pairs["end"] = cross_entropy(end, labels["end"][:, 0])
    losses = {name: mean(pair["loss"]) for name, pair in pairs.items()}
    loss = (losses["start"] + losses["end"]) / 2
    loss = loss + losses["answer_type"] + losses["sentence"] + losses["paragraph"]
    named = {f"{part}_{kind}": pair for part, by in pairs.items() for kind, pair in by.items()}
    return loss, named
