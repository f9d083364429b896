"""A language model that is a table: the logits of the next token, for each pair of last tokens.

Small enough to write down; its cache, the token before the last, is one that beams must reorder.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import decoding

VOCAB = 14
PAD, EOS = 2, 1


def table(seed: int = 0, scale: float = 2.0, eos_bonus: float = 0.0) -> np.ndarray:
    """Random logits [V, V, V]; a higher bonus ends sequences earlier."""
    logits = np.random.default_rng(seed).normal(0.0, scale, (VOCAB,) * 3).astype(np.float32)
    logits[:, :, EOS] += eos_bonus
    return logits


def step(logits: Any) -> decoding.Step:
    """One step of the table: the cache holds the token before, and counts its calls."""
    logits = jnp.asarray(logits)

    def next_logits(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        found = logits[cache["before"], tokens]
        return found, {"before": tokens, "calls": cache["calls"] + 1}

    return next_logits


def first(logits: Any, prompt: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The logits and the cache after the prompt; the token before the first is token 0."""
    prompt = jnp.asarray(prompt)
    before = prompt[:, -2] if prompt.shape[1] > 1 else jnp.zeros_like(prompt[:, -1])
    cache = {"before": prompt[:, -1], "calls": jnp.int32(0)}
    return jnp.asarray(logits)[before, prompt[:, -1]], cache


def run(logits: np.ndarray, prompt: Any, mask: Any = None, **settings: Any) -> decoding.Generated:
    """Generates from the table under jit; one program for all tables."""
    known = decoding.GenerationSettings(**{"eos_token_id": EOS, "pad_token_id": PAD} | settings)
    return program(known, logits, jnp.asarray(prompt, jnp.int32), mask, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def program(
    settings: decoding.GenerationSettings, logits: Any, prompt: Any, mask: Any, rng: jax.Array
) -> decoding.Generated:
    """From prompt to tokens; compiled once for each of settings and shape of the prompt."""
    mask = None if mask is None else jnp.asarray(mask)
    start, cache = first(logits, prompt)
    key = rng if settings.do_sample else None
    return decoding.generate(step(logits), prompt, start, cache, settings, key, mask)
