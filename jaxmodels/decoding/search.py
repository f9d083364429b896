"""The entry to generation: one call inside the caller's jit, whatever the trunk and the search."""

from typing import Any

import jax

from jaxmodels.decoding import beams, contract, sampling
from jaxmodels.decoding.contract import Generated, Step
from jaxmodels.decoding.settings import GenerationSettings


def generate(
    step: Step,
    prompt: jax.Array,
    logits: jax.Array,
    cache: Any,
    settings: GenerationSettings,
    rng: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
) -> Generated:
    """Generates a continuation of each prompt, in one `lax.while_loop`, as Hugging Face does.

    The caller has run the model on the prompt; what this function runs is `step`, once a token but
    for the first, until every row (with beams: every example) is done.

    What all beams of an example share, such as cross-attention keys, need not be in the cache: a
    step may close over it with B rows, as the K rows of an example are adjacent (tokens [N] are
    [B, K] flattened). It is then neither copied K times nor reordered.

    Args:
      step: (tokens [N] int32, the ones just chosen; cache) -> (logits [N, vocab] of the next
        token, cache). Traced; it may close over parameters.
      prompt: [B, P] int32: the start token of an encoder-decoder model, or the prompt of a
        decoder-only one, padded on the left.
      logits: [B, vocab], of the last prompt position.
      cache: what the step carries, after the prompt: a tree of B rows on axis 0 of each leaf;
        leaves of rank 0 belong to all rows.
      settings: how to choose; static.
      rng: for settings.do_sample; the same key gives the same tokens.
      prompt_mask: [B, P], 1 for tokens and 0 for padding, or None for no padding.

    Returns:
      `Generated`, of B * settings.num_return_sequences rows.

    Raises:
      ValueError: shapes that disagree, ids outside the vocabulary, sampling without `rng`.
    """
    contract.check_inputs(prompt, logits, cache, settings, prompt_mask)
    if settings.do_sample and rng is None:
        raise ValueError("do_sample=True draws random tokens: give rng, such as jax.random.key(0).")
    if settings.num_beams > 1:
        return beams.beam_search(step, prompt, logits, cache, settings, prompt_mask)
    return sampling.sample(step, prompt, logits, cache, settings, rng, prompt_mask)
