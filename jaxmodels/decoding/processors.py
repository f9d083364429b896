"""Logits processors: what is forbidden, discouraged or forced, in Hugging Face's order.

Each is a pure function of logits [N, V] and of the tokens so far: a buffer [N, T] whose first
`length` columns are filled. Positions of the buffer are static, `length` may be traced. A processor
that is off is not in the program.
"""

import jax
import jax.numpy as jnp

from jaxmodels.decoding.settings import GenerationSettings

NEVER = -jnp.inf


def process(
    logits: jax.Array,
    tokens: jax.Array,
    length: jax.Array | int,
    settings: GenerationSettings,
    prompt_length: int,
    num_padding: jax.Array | None = None,
) -> jax.Array:
    """Applies every processor that the settings switch on.

    Args:
      logits: [N, V] float32, logits or log-probabilities.
      tokens: [N, T] int32; columns from `length` on are ignored.
      length: filled columns, the prompt included.
      settings: which processors, and how strong.
      prompt_length: columns of the prompt.
      num_padding: [N], left padding of each prompt, or None for none.

    Returns:
      [N, V] float32, forbidden tokens at -inf.
    """
    if settings.repetition_penalty != 1.0:
        logits = repetition_penalty(
            logits, tokens, length, settings.repetition_penalty, num_padding
        )
    if settings.no_repeat_ngram_size:
        logits = no_repeat_ngram(logits, tokens, length, settings.no_repeat_ngram_size)
    if settings.min_new_tokens and settings.eos_ids:
        least = prompt_length + settings.min_new_tokens
        logits = min_length(logits, length, least, settings.eos_ids)
    if settings.forced_bos_token_id is not None and prompt_length == 1:
        logits = forced(logits, length == 1, (settings.forced_bos_token_id,))
    if settings.forced_eos_ids:
        last = prompt_length + settings.max_new_tokens - 1
        logits = forced(logits, length == last, settings.forced_eos_ids)
    return logits


def count_padding(prompt_mask: jax.Array | None) -> jax.Array | None:
    """Left padding [B] of a mask [B, P]; 0 for a row without any real token, None without mask."""
    return None if prompt_mask is None else jnp.argmax(prompt_mask != 0, axis=1)


def repetition_penalty(
    logits: jax.Array,
    tokens: jax.Array,
    length: jax.Array | int,
    penalty: float,
    num_padding: jax.Array | None = None,
) -> jax.Array:
    """Weakens tokens that are present: logits above 0 are divided, others multiplied by penalty.

    Left padding, `num_padding` [N] columns, does not make its token present.
    """
    column = jnp.arange(tokens.shape[1])[None, :]
    counts = column < length
    if num_padding is not None:
        counts &= column >= num_padding[:, None]
    present = _members(tokens, counts, logits.shape[1])
    weaker = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(present, weaker, logits)


def no_repeat_ngram(
    logits: jax.Array, tokens: jax.Array, length: jax.Array | int, size: int
) -> jax.Array:
    """Forbids each token that would complete an n-gram of `size` tokens already in the row."""
    num_windows = tokens.shape[1] - size + 1
    if num_windows < 1:
        return logits
    same = jnp.arange(num_windows)[None, :] + size <= length  # the window is filled
    for i in range(size - 1):
        latest = jax.lax.dynamic_slice_in_dim(tokens, length - size + 1 + i, 1, axis=1)
        same &= tokens[:, i : i + num_windows] == latest
    banned = _members(tokens[:, size - 1 :], same, logits.shape[1])
    return jnp.where(banned, NEVER, logits)


def min_length(
    logits: jax.Array, length: jax.Array | int, least: int, eos_ids: tuple[int, ...]
) -> jax.Array:
    """Forbids the eos tokens while fewer than `least` columns, with the prompt's, are filled."""
    return jnp.where(_one_of(eos_ids, logits.shape[1]) & (length < least), NEVER, logits)


def forced(logits: jax.Array, here: jax.Array | bool, ids: tuple[int, ...]) -> jax.Array:
    """Where `here` (a scalar): the given tokens get 0, all others -inf."""
    only = jnp.where(_one_of(ids, logits.shape[1]), 0.0, NEVER)
    return jnp.where(here, only, logits)


def _members(tokens: jax.Array, counts: jax.Array, vocab_size: int) -> jax.Array:
    """[N, V] bool: the ids of tokens [N, T] at the places that count; one scatter a row."""
    ids = jnp.where(counts, tokens, vocab_size)  # out of bounds: dropped
    empty = jnp.zeros(vocab_size, bool)
    return jax.vmap(lambda row: empty.at[row].set(True, mode="drop"))(ids)


def _one_of(ids: tuple[int, ...], vocab_size: int) -> jax.Array:
    return jnp.any(jnp.arange(vocab_size)[:, None] == jnp.asarray(ids), axis=1)[None, :]
