"""What a decoding loop is given and returns: the step, the rows of its cache, and `Generated`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.core.generation import check_left_padded
from jaxmodels.decoding.settings import GenerationSettings

MAX_CHOSEN = 16  # beams up to which comparing with each is cheaper than a gather, on a CPU

# step(tokens [N] int32, cache) -> (logits [N, vocab] of the next token, cache)
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@struct.dataclass
class Generated:
    """What was generated; R rows, `num_return_sequences` adjacent ones for each example.

    Attributes:
      sequences: [R, prompt + max_new_tokens] int32, the prompt first, pad after the end.
      lengths: [R] int32, new tokens, the eos included.
      scores: [R] float32. Greedy and sampled: the sum of the log-probabilities of the new tokens,
        after processors and filters. Beams: that sum (processed but not renormalised) divided by
        length ** length_penalty, Hugging Face's `sequences_scores`.
      finished: [R] bool, False where the row ran into max_new_tokens without an eos.
      step_logits: [max_new_tokens, N, vocab] float32 as the step gave them (N rows of the loop,
        beams included; zeros after the last step), or None unless settings.return_logits.
    """

    sequences: jax.Array
    lengths: jax.Array
    scores: jax.Array
    finished: jax.Array
    step_logits: jax.Array | None = None


def check_inputs(
    prompt: jax.Array,
    logits: jax.Array,
    cache: Any,
    settings: GenerationSettings,
    prompt_mask: jax.Array | None,
) -> None:
    """Refuses inputs of generation that do not fit together, while tracing.

    Raises:
      ValueError: shapes of prompt, mask, logits or cache that disagree, a mask with padding that
        is not in front, or token ids outside the vocabulary.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt is {prompt.dtype}{list(prompt.shape)}: give integers [batch, length >= 1]; "
            "for encoder-decoder models the start token."
        )
    if logits.ndim != 2 or logits.shape[0] != prompt.shape[0]:
        raise ValueError(
            f"logits have shape {list(logits.shape)} for a prompt of {prompt.shape[0]} rows: give "
            "those of the last prompt position, [batch, vocab]."
        )
    if prompt_mask is not None and prompt_mask.shape != prompt.shape:
        raise ValueError(
            f"prompt_mask has shape {list(prompt_mask.shape)}, prompt {list(prompt.shape)}: "
            "make them equal."
        )
    check_left_padded(prompt_mask, prompt.shape[1], "prompt_mask")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] != prompt.shape[0]:
            raise ValueError(
                f"cache{jax.tree_util.keystr(path)} has shape {list(jnp.shape(leaf))}: its axis 0 "
                f"must be the {prompt.shape[0]} rows of the prompt (rank 0 is shared by all)."
            )
    for name in ("eos_ids", "forced_eos_ids", "forced_bos_token_id"):
        value = getattr(settings, name)
        ids = value if isinstance(value, tuple) else (() if value is None else (value,))
        if any(i >= logits.shape[1] for i in ids):
            raise ValueError(
                f"settings ask for {name}={value}, the logits have a vocabulary of "
                f"{logits.shape[1]}: give ids below it."
            )


def repeat_rows(tree: Any, times: int) -> Any:
    """Repeats each row of a tree `times` times, copies adjacent; leaves of rank 0 stay."""
    if times == 1:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0) if jnp.ndim(x) else x, tree)


def take_beams(tree: Any, index: jax.Array) -> Any:
    """Picks beams within each example: leaves [B, K, ...] and index [B, M] give [B, M, ...]."""
    return jax.tree.map(jax.vmap(lambda x, i: x[i]), tree, jax.tree.map(lambda _: index, tree))


def reorder_rows(cache: Any, index: jax.Array) -> Any:
    """Picks rows within each example: leaves [B * K, ...], index [B, K]; rank 0 stays.

    Examples never mix, so that a batch split over devices needs no exchange.
    """

    beams = index.shape[1]

    def pick(leaf: jax.Array) -> jax.Array:
        if not jnp.ndim(leaf):
            return leaf
        rows = leaf.reshape(*index.shape, *leaf.shape[1:])
        # A gather of whole rows goes entry by entry on a CPU, at five times the cost of choosing.
        chosen = _choose if jax.default_backend() == "cpu" and beams <= MAX_CHOSEN else take_beams
        return chosen(rows, index).reshape(leaf.shape)

    return jax.tree.map(pick, cache)


def _choose(rows: jax.Array, index: jax.Array) -> jax.Array:
    """As `take_beams`, by comparing with each beam in turn: exact, and contiguous reads."""
    index = index.reshape(*index.shape, *[1] * (rows.ndim - 2))
    chosen = jnp.broadcast_to(rows[:, :1], rows.shape)
    for beam in range(1, rows.shape[1]):
        chosen = jnp.where(index == beam, rows[:, beam : beam + 1], chosen)
    return chosen


def start_tokens(prompt: jax.Array, settings: GenerationSettings) -> jax.Array:
    """The token buffer [rows, prompt + max_new_tokens] int32: the prompt, then padding."""
    room = ((0, 0), (0, settings.max_new_tokens))
    return jnp.pad(prompt.astype(jnp.int32), room, constant_values=settings.pad_id)


def write_tokens(tokens: jax.Array, position: jax.Array | int, chosen: jax.Array) -> jax.Array:
    """Writes chosen [...] into column `position` of tokens [..., length]."""
    axis = tokens.ndim - 1
    return jax.lax.dynamic_update_slice_in_dim(tokens, chosen[..., None], position, axis)


def start_logits(logits: jax.Array, settings: GenerationSettings) -> jax.Array | None:
    """A buffer for the logits of every step, or None where nobody asked for them."""
    if not settings.return_logits:
        return None
    return jnp.zeros((settings.max_new_tokens, *logits.shape), jnp.float32)


def keep_logits(
    kept: jax.Array | None, logits: jax.Array, index: jax.Array | int
) -> jax.Array | None:
    """Writes logits [N, vocab] as step `index` of the buffer, if there is one."""
    if kept is None:
        return None
    return jax.lax.dynamic_update_index_in_dim(kept, logits, index, 0)


def is_eos(tokens: jax.Array, settings: GenerationSettings) -> jax.Array:
    """Where tokens end a sequence: bool of their shape, all False without eos ids."""
    ended = jnp.zeros(tokens.shape, bool)
    for eos in settings.eos_ids:
        ended |= tokens == eos
    return ended
