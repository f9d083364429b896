"""The generator over a real trunk: what it keeps of the parameters never outlives them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import decoding
from jaxmodels.trunks import t5
from tests.vcc import small

CONFIG = t5.T5Config(
    vocab_size=40, d_model=16, num_layers=1, num_decoder_layers=2, num_heads=2, head_dim=6, d_ff=24
)
IDS = np.random.default_rng(0).integers(2, 40, (3, 7)).astype(np.int32)
SETTINGS = decoding.GenerationSettings(max_new_tokens=5, eos_token_id=1, pad_token_id=0)


@functools.cache
def params(seed: int):
    model = t5.T5(CONFIG)
    made = small.drawn(model.init, jnp.asarray(IDS), size=0.5, spread=True)["params"]
    return jax.tree.map(lambda x: x * (1 + seed), made)


def test_other_parameters_are_prepared_anew_and_the_same_ones_are_not():
    generate = decoding.Generator(t5.T5(CONFIG), SETTINGS)
    first = generate(params(0), IDS)
    kept = generate._kept[1]
    again = generate(params(0), IDS)
    assert generate._kept[1] is kept
    np.testing.assert_array_equal(first.sequences, again.sequences)
    changed = dict(params(0)) | {"shared": {"embedding": -params(0)["shared"]["embedding"]}}
    other = generate(changed, IDS)
    assert generate._kept[1] is not kept
    fresh = decoding.Generator(t5.T5(CONFIG), SETTINGS)(changed, IDS)
    np.testing.assert_array_equal(other.sequences, fresh.sequences)
    assert (np.asarray(other.sequences) != np.asarray(first.sequences)).any()


def test_it_works_inside_a_program_and_keeps_no_tracer():
    generate = decoding.Generator(t5.T5(CONFIG), SETTINGS)
    inside = jax.jit(lambda params: generate(params, IDS).sequences)(params(0))
    assert generate._kept == (None, None)
    np.testing.assert_array_equal(inside, generate(params(0), IDS).sequences)


def test_one_program_serves_all_batches_of_a_shape():
    generate = decoding.Generator(t5.T5(CONFIG), SETTINGS)
    for ids in (IDS, IDS[::-1].copy(), IDS + 1):
        generate(params(0), ids)
    assert generate._compiled._cache_size() == 1
    assert "while" in generate.lower(params(0), IDS).as_text()
