"""Losses that several methods share, as (sum, weight) pairs, which add up exactly over batches."""

import jax
import jax.numpy as jnp

IGNORE = -100  # label of what does not count
Pair = tuple[jax.Array, jax.Array]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weight: jax.Array | None = None
) -> dict[str, Pair]:
    """Cross-entropy and accuracy.

    Args:
      logits: [..., classes], taken to float32.
      labels: [...] int; -100 does not count.
      weight: [...] float32 on top of that; default 1.

    Returns:
      "loss" and "accuracy", each (sum, weight).
    """
    counted = (labels != IGNORE).astype(jnp.float32)
    if weight is not None:
        counted = counted * weight
    target = jnp.where(labels == IGNORE, 0, labels)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]
    hit = (logits.argmax(axis=-1) == target).astype(jnp.float32)
    total = counted.sum()
    return {"loss": ((nll * counted).sum(), total), "accuracy": ((hit * counted).sum(), total)}
