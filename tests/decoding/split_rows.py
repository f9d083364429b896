"""Generates with rows split over two devices and on one, and reads the program; a test runs it."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels import decoding
from jaxmodels.decoding import GenerationSettings

VOCAB = 4096


@functools.partial(jax.jit, static_argnums=0)
def program(settings: GenerationSettings, embedding: jax.Array, prompt: jax.Array) -> Any:
    """A recurrent model with a cache of [N, 300] and a vocabulary wide enough to tell apart."""

    def step(tokens: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(jnp.roll(state, 1, axis=1) + embedding[tokens])
        return state @ embedding.T, state

    logits, state = step(prompt[:, 0], jnp.zeros((len(prompt), embedding.shape[1])))
    return decoding.generate(step, prompt, logits, state, settings, jax.random.key(0))


def check(settings: GenerationSettings) -> None:
    """Equal tokens on one device and on two; what the two exchange is small."""
    mesh = jax.make_mesh((2,), ("node",), axis_types=(AxisType.Auto,))
    by_row, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("node",), ()))
    embedding = np.random.default_rng(0).normal(0, 0.3, (VOCAB, 300)).astype(np.float32)
    prompt = np.asarray([[0], [3], [5], [6]], np.int32)
    expected = program(settings, embedding, prompt)
    split = jax.device_put(embedding, whole), jax.device_put(prompt, by_row)
    compiled = program.lower(settings, *split).compile()
    found = compiled(*split)
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    text = compiled.as_text()
    assert "all-reduce" in text and "all-to-all" not in text  # one asks: are all rows done?
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text):
        wide = max(map(int, shape.split(",")))
        assert wide < 300, f"an array of [{shape}] is gathered: logits or cache"


if __name__ == "__main__":
    assert jax.device_count() == 2
    common = {"max_new_tokens": 7, "eos_token_id": 1}
    check(GenerationSettings(**common, do_sample=True, top_k=9, top_p=0.9, no_repeat_ngram_size=2))
    check(GenerationSettings(**common, num_beams=3, repetition_penalty=1.2))
    print("same")
