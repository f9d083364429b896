"""One token a row and step: greedy decoding and sampling, with the filters of the distribution."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.decoding import contract, processors, wide_rows
from jaxmodels.decoding.contract import Generated, Step
from jaxmodels.decoding.settings import GenerationSettings


@struct.dataclass
class _State:
    """The loop's state: N rows, of which `ended` ones only collect padding."""

    num_new: jax.Array
    tokens: jax.Array
    last: jax.Array
    ended: jax.Array
    lengths: jax.Array
    scores: jax.Array
    cache: Any
    step_logits: jax.Array | None


def sample(
    step: Step,
    prompt: jax.Array,
    logits: jax.Array,
    cache: Any,
    settings: GenerationSettings,
    rng: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
) -> Generated:
    """Generates greedily, or by sampling where settings.do_sample; arguments as in `generate`."""
    copies = settings.num_return_sequences
    prompt, logits, cache, prompt_mask = contract.repeat_rows(
        (prompt, logits.astype(jnp.float32), cache, prompt_mask), copies
    )
    num_rows, prompt_length = prompt.shape
    num_padding = processors.count_padding(prompt_mask)

    def advance(state: _State, logits: jax.Array) -> _State:
        """Chooses a token for each row from the logits and writes it."""
        logits = logits.astype(jnp.float32)
        length = prompt_length + state.num_new
        scores = processors.process(
            logits, state.tokens, length, settings, prompt_length, num_padding
        )
        chosen, log_probs = _choose(scores, state.num_new, settings, rng)
        chosen = jnp.where(state.ended, settings.pad_id, chosen)
        return state.replace(
            num_new=state.num_new + 1,
            tokens=contract.write_tokens(state.tokens, length, chosen),
            last=chosen,
            ended=state.ended | contract.is_eos(chosen, settings),
            lengths=state.lengths + ~state.ended,
            scores=state.scores + jnp.where(state.ended, 0.0, log_probs),
            step_logits=contract.keep_logits(state.step_logits, logits, state.num_new),
        )

    def body(state: _State) -> _State:
        logits, cache = step(state.last, state.cache)
        return advance(state.replace(cache=cache), logits)

    state = _State(
        num_new=jnp.int32(0),
        tokens=contract.start_tokens(prompt, settings),
        last=jnp.zeros(num_rows, jnp.int32),
        ended=jnp.zeros(num_rows, bool),
        lengths=jnp.zeros(num_rows, jnp.int32),
        scores=jnp.zeros(num_rows, jnp.float32),
        cache=cache,
        step_logits=contract.start_logits(logits, settings),
    )
    state = advance(state, logits)  # the first token costs no step: its logits are the prompt's
    if settings.max_new_tokens > 1:
        state = jax.lax.while_loop(
            lambda s: (s.num_new < settings.max_new_tokens) & ~jnp.all(s.ended), body, state
        )
    return Generated(state.tokens, state.lengths, state.scores, state.ended, state.step_logits)


def _choose(
    scores: jax.Array, index: jax.Array, settings: GenerationSettings, rng: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """A token for each row of scores [N, V], and the logarithm of its probability."""
    if settings.do_sample:
        scores = filter_logits(scores, settings)
        chosen = wide_rows.draw(jax.random.fold_in(rng, index), scores)
    else:
        chosen = jnp.argmax(scores, axis=-1)
    picked = jnp.take_along_axis(scores, chosen[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.int32), picked - jax.nn.logsumexp(scores, axis=-1)


def filter_logits(logits: jax.Array, settings: GenerationSettings) -> jax.Array:
    """Applies temperature, then top-k, then top-p to logits [N, V]; what is cut becomes -inf."""
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    return logits


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Cuts every logit below the k-th largest of its row; those equal to it all stay."""
    least = wide_rows.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, processors.NEVER, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest most probable tokens that together hold probability `p`; always one.

    The least probable tokens go, as long as their probabilities sum to 1 - p or less; among equals
    those of lower id (Hugging Face leaves that open).
    """
    probs = jax.nn.softmax(logits, axis=-1)
    least, cut = wide_rows.mass_threshold(logits, probs, 1 - p)
    below, equal = logits < least, logits == least
    each = jnp.max(jnp.where(equal, probs, 0.0), axis=-1, keepdims=True)
    num_equal = jnp.sum(equal, axis=-1, keepdims=True)
    num_cut = jnp.minimum(jnp.floor((1 - p - cut) / each), num_equal - 1)
    first = jnp.cumsum(equal, axis=-1) <= num_cut
    return jnp.where(below | (equal & first), processors.NEVER, logits)
