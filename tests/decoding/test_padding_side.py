"""Prompts with padding behind their tokens would be continued from the padding: refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import decoding
from jaxmodels.decoding import GenerationSettings
from jaxmodels.trunks import decoder_lm
from tests.decoding import tables
from tests.vcc import small

CONFIG = decoder_lm.DecoderConfig(
    vocab_size=11, d_model=8, num_layers=1, num_heads=2, d_ff=8, max_positions=12
)
SETTINGS = GenerationSettings(max_new_tokens=2)
IDS = np.arange(8, dtype=np.int32).reshape(2, 4)
LEFT = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
WRONG = {
    "behind": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "between": np.array([[0, 1, 1, 1], [1, 0, 1, 1]]),
}
WORDS = r"mask: row 1 is \[1, .*all padding must be in front: pad on the left"


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    model = decoder_lm.DecoderLM(CONFIG)
    return model, small.drawn(model.init, jnp.asarray(IDS), size=0.3)["params"]


@pytest.mark.parametrize("kind", WRONG)
def test_padding_that_is_not_in_front_is_refused_at_every_entry(model, kind) -> None:
    module, params = model
    for mask in (WRONG[kind], jnp.asarray(WRONG[kind]), WRONG[kind].astype(bool)):
        with pytest.raises(ValueError, match="attention_" + WORDS):
            decoding.Generator(module, SETTINGS)(params, IDS, mask)
    with pytest.raises(ValueError, match="attention_" + WORDS):
        start = {"max_new_tokens": 2, "method": "start"}
        module.apply({"params": params}, IDS, WRONG[kind], **start)
    logits = np.zeros((2, tables.VOCAB), np.float32)
    with pytest.raises(ValueError, match="prompt_" + WORDS):
        decoding.generate(None, IDS, logits, (), SETTINGS, prompt_mask=WRONG[kind])


def test_padding_in_front_empty_rows_and_traced_masks_pass(model) -> None:
    module, params = model
    generator = decoding.Generator(module, SETTINGS)
    assert generator(params, IDS, LEFT).sequences.shape == (2, 6)
    empty = LEFT * np.array([[0], [1]])
    assert generator(params, IDS, empty).sequences.shape == (2, 6)
    traced = jax.eval_shape(lambda mask: generator._run(params, None, IDS, mask, None, {}), LEFT)
    assert traced.sequences.shape == (2, 6)


def test_soft_prompts_may_stand_in_front_of_the_padding(model) -> None:
    module, params = model
    soft = jnp.ones((2, 3, 8))
    words = module.apply({"params": params}, IDS, method="embed")
    given = {"inputs_embeds": jnp.concatenate([soft, words], axis=1)}
    mask = np.concatenate([np.ones((2, 3), int), LEFT], axis=1)
    generator = decoding.Generator(module, SETTINGS)
    assert generator(params, IDS, mask, **given).sequences.shape == (2, 6)
    mask[1, -1] = 0
    with pytest.raises(ValueError, match="padding behind"):
        generator(params, IDS, mask, **given)
