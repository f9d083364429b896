"""Settings refuse what they cannot do, in words, and keep Hugging Face's lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmodels import decoding
from jaxmodels.decoding import GenerationSettings
from tests.decoding import tables


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 0}, "give 1 or more"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "between 0 and max_new_tokens=4"),
        ({"eos_token_id": -1}, "token ids are integers"),
        ({"eos_token_id": ()}, "token ids are integers"),
        ({"pad_token_id": 1.5}, "token ids are integers"),
        ({"forced_eos_token_id": (1, -2)}, "forced_eos_token_id"),
        ({"temperature": 0.0}, "greedy decoding"),
        ({"temperature": float("nan")}, "above 0"),
        ({"top_p": 0.0}, "1.0 keeps every token"),
        ({"top_p": 1.1}, "1.0 keeps every token"),
        ({"top_k": -1}, "0 for off"),
        ({"no_repeat_ngram_size": -2}, "0 for off"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "exceeds num_beams=2"),
        ({"num_return_sequences": 2}, "do_sample=True"),
        ({"early_stopping": "always"}, '"never"'),
        ({"early_stopping": 1}, '"never"'),
        ({"do_sample": True, "num_beams": 2}, "sampled beams are not supported"),
    ],
)
def test_a_wrong_setting_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationSettings(**change)


def test_total_lengths_count_the_prompt() -> None:
    found = GenerationSettings.from_total_lengths(512, min_length=20, num_beams=2)
    assert found == GenerationSettings(max_new_tokens=511, min_new_tokens=19, num_beams=2)
    assert GenerationSettings.from_total_lengths(9, 3, prompt_length=5).min_new_tokens == 0
    with pytest.raises(ValueError, match="no room after a prompt of 9"):
        GenerationSettings.from_total_lengths(9, prompt_length=9)


def test_settings_hash_and_name_their_padding() -> None:
    found = GenerationSettings(eos_token_id=[7, 3])
    assert hash(found) == hash(GenerationSettings(eos_token_id=(7, 3)))
    assert found.eos_ids == (7, 3) and found.pad_id == 7
    assert GenerationSettings(eos_token_id=5, pad_token_id=0).pad_id == 0
    assert GenerationSettings().pad_id == 0 and GenerationSettings().eos_ids == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": jnp.zeros(2, jnp.int32)}, "give integers"),
        ({"prompt": jnp.zeros((2, 1))}, "float32"),
        ({"prompt": jnp.zeros((2, 0), jnp.int32)}, "length >= 1"),
        ({"logits": jnp.zeros((3, tables.VOCAB))}, "prompt of 2 rows"),
        ({"logits": jnp.zeros((2, 1, tables.VOCAB))}, "last prompt position"),
        ({"prompt_mask": jnp.ones((2, 2), jnp.int32)}, "make them equal"),
        ({"cache": {"keys": jnp.zeros((3, 4))}}, "'keys'.*2 rows"),
        ({"settings": GenerationSettings(eos_token_id=tables.VOCAB)}, "ids below it"),
        ({"settings": GenerationSettings(forced_bos_token_id=99)}, "forced_bos_token_id=99"),
        ({"settings": GenerationSettings(do_sample=True)}, "give rng"),
        (
            {"settings": GenerationSettings(eos_token_id=tuple(range(14)), num_beams=3)},
            "45 candidates a step, a vocabulary of 14 has 42",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_any_step(
    change: dict[str, Any], words: str
) -> None:
    def step(tokens: jax.Array, cache: Any) -> Any:
        raise AssertionError("the step was traced")

    given = {
        "prompt": jnp.zeros((2, 1), jnp.int32),
        "logits": jnp.zeros((2, tables.VOCAB)),
        "cache": {"before": jnp.zeros(2, jnp.int32), "calls": jnp.int32(0)},
        "settings": GenerationSettings(),
    }
    with pytest.raises(ValueError, match=words):
        decoding.generate(step, **{**given, **change})
