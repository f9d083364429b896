"""Beam search, token for token that of Hugging Face transformers 5.

Array axes: B examples, K beams, M candidates a step, T columns of the token buffer, V vocabulary.
An example has K running hypotheses and K places for finished ones. The constant -1e9 and the order
in which it is added are part of the definition: they decide which of two hopeless hypotheses wins.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.decoding import contract, processors, wide_rows
from jaxmodels.decoding.contract import Generated, Step
from jaxmodels.decoding.settings import GenerationSettings

HOPELESS = -1.0e9


@struct.dataclass
class _Finished:
    """The best finished hypotheses of each example, best first; all [B, K, ...]."""

    tokens: jax.Array
    scores: jax.Array
    filled: jax.Array
    ended: jax.Array  # by eos, not by the length
    lengths: jax.Array


@struct.dataclass
class _State:
    """The loop's state: running hypotheses [B, K, T] with scores [B, K], and what is finished."""

    num_new: jax.Array
    tokens: jax.Array
    scores: jax.Array
    finished: _Finished
    open: jax.Array  # [B]: could a running hypothesis still improve on the finished ones?
    stop: jax.Array
    parents: jax.Array  # [B, K]: the cache row that each running hypothesis continues
    cache: Any
    step_logits: jax.Array | None


def beam_search(
    step: Step,
    prompt: jax.Array,
    logits: jax.Array,
    cache: Any,
    settings: GenerationSettings,
    prompt_mask: jax.Array | None = None,
) -> Generated:
    """Generates with `settings.num_beams` hypotheses an example; arguments as in `generate`.

    Raises:
      ValueError: a vocabulary too small for the candidates of a step.
    """
    (batch, prompt_length), vocab_size, beams = prompt.shape, logits.shape[1], settings.num_beams
    if _num_candidates(settings) > beams * vocab_size:
        raise ValueError(
            f"{beams} beams with {len(settings.eos_ids)} eos tokens compare "
            f"{_num_candidates(settings)} candidates a step, a vocabulary of {vocab_size} has "
            f"{beams * vocab_size}: list fewer eos tokens."
        )
    prompt, logits, cache, prompt_mask = contract.repeat_rows(
        (prompt, logits.astype(jnp.float32), cache, prompt_mask), beams
    )
    num_padding = processors.count_padding(prompt_mask)

    def advance(state: _State, logits: jax.Array) -> _State:
        """Continues the running hypotheses by the tokens that the logits favour."""
        logits = logits.astype(jnp.float32)
        rows = state.tokens.reshape(batch * beams, -1)
        log_probs = processors.process(
            jax.nn.log_softmax(logits, axis=-1),
            rows,
            prompt_length + state.num_new,
            settings,
            prompt_length,
            num_padding,
        )
        kept = contract.keep_logits(state.step_logits, logits, state.num_new)
        return _advance(state.replace(step_logits=kept), log_probs, settings, prompt_length)

    def body(state: _State) -> _State:
        last = jax.lax.dynamic_index_in_dim(
            state.tokens, prompt_length + state.num_new - 1, axis=2, keepdims=False
        )
        cache = contract.reorder_rows(state.cache, state.parents)
        logits, cache = step(last.reshape(-1), cache)
        return advance(state.replace(cache=cache), logits)

    tokens = contract.start_tokens(prompt, settings)
    state = _start(tokens.reshape(batch, beams, -1), cache)
    state = state.replace(step_logits=contract.start_logits(logits, settings))
    state = advance(state, logits)  # the first token costs no step: its logits are the prompt's
    if settings.max_new_tokens > 1:
        state = jax.lax.while_loop(lambda s: ~s.stop, body, state)
    best = jax.tree.map(
        lambda x: x[:, : settings.num_return_sequences].reshape(-1, *x.shape[2:]), state.finished
    )
    return Generated(best.tokens, best.lengths, best.scores, best.ended, state.step_logits)


def _start(tokens: jax.Array, cache: Any) -> _State:
    """All beams of an example start alike, so all but the first are hopeless."""
    batch, beams, _ = tokens.shape
    shape = (batch, beams)
    finished = _Finished(
        tokens=tokens,
        scores=jnp.full(shape, HOPELESS, jnp.float32),
        filled=jnp.zeros(shape, bool),
        ended=jnp.zeros(shape, bool),
        lengths=jnp.zeros(shape, jnp.int32),
    )
    return _State(
        num_new=jnp.int32(0),
        tokens=tokens,
        scores=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, HOPELESS), shape),
        finished=finished,
        open=jnp.ones(batch, bool),
        stop=jnp.zeros((), bool),
        parents=jnp.zeros(shape, jnp.int32),
        cache=cache,
        step_logits=None,
    )


def _advance(
    state: _State, log_probs: jax.Array, settings: GenerationSettings, prompt_length: int
) -> _State:
    """One step of the search, from the processed log-probabilities [B * K, V] of the next token."""
    beams = settings.num_beams
    position, num_new = prompt_length + state.num_new, state.num_new + 1
    scores, parents, chosen = _candidates(state.scores, log_probs, settings)
    ended = contract.is_eos(chosen, settings)
    hits = ended | (num_new >= settings.max_new_tokens)

    running_scores, order = jax.lax.top_k(scores + hits * jnp.float32(HOPELESS), beams)
    running_parents = contract.take_beams(parents, order)
    running = contract.take_beams(state.tokens, running_parents)
    running = contract.write_tokens(running, position, contract.take_beams(chosen, order))

    # Only the best K candidates may finish; the others are there to keep K running.
    tokens = contract.take_beams(state.tokens, parents[:, :beams])
    candidates = _Finished(
        tokens=contract.write_tokens(tokens, position, chosen[:, :beams]),
        scores=scores[:, :beams] / _length_divisors(settings)[num_new],
        filled=hits[:, :beams],
        ended=ended[:, :beams],
        lengths=jnp.full(chosen[:, :beams].shape, num_new),
    )
    finished = _finish(state.finished, candidates, state.open, settings)
    still_open = state.open & _can_improve(running_scores[:, 0], finished, num_new, settings)
    stop = ~jnp.any(still_open) | jnp.all(hits)
    if settings.early_stopping is True:
        stop |= jnp.all(finished.filled)
    return state.replace(
        num_new=num_new,
        tokens=running,
        scores=running_scores,
        finished=finished,
        open=still_open,
        stop=stop,
        parents=running_parents,
    )


def _num_candidates(settings: GenerationSettings) -> int:
    """Enough that K of them go on even where every beam could end in every eos token."""
    return max(2, 1 + len(settings.eos_ids)) * settings.num_beams


def _candidates(
    running: jax.Array, log_probs: jax.Array, settings: GenerationSettings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best M of K * V continuations: scores, beams and tokens, each [B, M], best first.

    The best M of each beam, then the best M of those: the same candidates in the same order as one
    search over K * V, as equal scores rank by beam, then token, both ways.
    """
    (batch, beams), vocab_size = running.shape, log_probs.shape[-1]
    num = _num_candidates(settings)
    each = min(num, vocab_size)
    total = log_probs + running.reshape(-1, 1)
    scores, tokens = wide_rows.top_k(total, each)
    scores, index = jax.lax.top_k(scores.reshape(batch, beams * each), num)
    tokens = contract.take_beams(tokens.reshape(batch, beams * each), index)
    return scores, index // each, tokens


def _finish(
    finished: _Finished, candidates: _Finished, still_open: jax.Array, settings: GenerationSettings
) -> _Finished:
    """Merges the candidates that ended into the finished hypotheses, the best K of both."""
    scores = candidates.scores
    if settings.early_stopping is True:  # a full example takes no more
        full = jnp.all(finished.filled, axis=1, keepdims=True)
        scores += full * jnp.float32(HOPELESS)
    scores += ~still_open[:, None] * jnp.float32(HOPELESS)
    scores += ~candidates.filled * jnp.float32(HOPELESS)
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1),
        finished,
        candidates.replace(scores=scores),
    )
    _, order = jax.lax.top_k(both.scores, settings.num_beams)
    return contract.take_beams(both, order)


def _can_improve(
    best_running: jax.Array, finished: _Finished, num_new: jax.Array, settings: GenerationSettings
) -> jax.Array:
    """[B]: could the best running hypothesis beat the worst finished one, or fill a place?"""
    length = num_new
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = settings.max_new_tokens  # where its present score would count most
    hoped = best_running / _length_divisors(settings)[length]
    worst = jnp.min(finished.scores, axis=1, keepdims=True)
    worst = jnp.where(finished.filled, worst, HOPELESS)
    return jnp.any(hoped[:, None] > worst, axis=1)


def _length_divisors(settings: GenerationSettings) -> jax.Array:
    """length ** length_penalty for 0 .. max_new_tokens, rounded once from float64."""
    lengths = np.arange(settings.max_new_tokens + 1, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        return jnp.asarray((lengths**settings.length_penalty).astype(np.float32))
