"""VCC-T5 writes: loss, greedy and beam search with the VIP mask, and weights of other makers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import decoding, weights
from jaxmodels.core import hooks
from jaxmodels.core import params as param_tree
from jaxmodels.trunks import t5
from jaxmodels.vcc import VccT5
from jaxmodels.weights.t5 import t5_rules
from jaxmodels.weights.tensor_file import as_tensor_file
from tests.vcc import small, small_t5

MODEL = VccT5(small_t5.GATED, small.vcc(("local", "vcc", "vcc")))
NEW = 5


@pytest.fixture(scope="module")
def given() -> dict[str, jax.Array]:
    return small_t5.inputs(2, 28, 21)


@pytest.fixture(scope="module")
def params() -> Any:
    return small_t5.params(small_t5.GATED)


def generate(params: Any, given: dict[str, jax.Array], **settings: Any) -> decoding.Generated:
    wanted = decoding.GenerationSettings(max_new_tokens=NEW, eos_token_id=1, **settings)
    return decoding.Generator(MODEL, wanted)(params, **given)


@jax.jit
def scores(params: Any, given: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Log-probabilities [B, T, vocab] of what follows each of `tokens`."""
    logits = MODEL.apply({"params": params}, decoder_input_ids=tokens, **given)
    return jax.nn.log_softmax(logits)


def test_greedy_tokens_are_the_likeliest_of_the_whole_model(params: Any, given: dict) -> None:
    found = generate(params, given)
    likeliest = np.asarray(scores(params, given, found.sequences)).argmax(-1)
    for row, (tokens, length) in enumerate(zip(found.sequences, found.lengths, strict=True)):
        assert tokens[0] == 0
        np.testing.assert_array_equal(tokens[1 : 1 + length], likeliest[row, :length])


def test_beams_are_scored_by_the_whole_model_and_beat_greedy(params: Any, given: dict) -> None:
    beams = generate(params, given, num_beams=4, length_penalty=0.0)
    greedy = generate(params, given)
    log_probs = np.asarray(scores(params, given, beams.sequences))
    for row, (tokens, length) in enumerate(zip(beams.sequences, beams.lengths, strict=True)):
        picked = np.asarray(tokens)[1 : 1 + int(length)]
        total = log_probs[row, np.arange(int(length)), picked].sum()
        assert total == pytest.approx(float(beams.scores[row]), abs=1e-4)
    assert (beams.scores >= greedy.scores - 1e-4).all()


def test_generation_depends_on_the_vip_mask(params: Any, given: dict) -> None:
    other = given | {"vip_mask": jnp.flip(given["vip_mask"] * 0 + (jnp.arange(28) > 24), 1)}
    one, two = (scores(params, g, jnp.zeros((2, 1), jnp.int32)) for g in (given, other))
    assert float(jnp.abs(one - two).max()) > 1e-3


def test_a_missing_vip_mask_is_refused_where_layers_compress(params: Any, given: dict) -> None:
    plain = {name: x for name, x in given.items() if name != "vip_mask"}
    with pytest.raises(ValueError, match="vip_mask is missing"):
        MODEL.apply({"params": params}, **plain)
    dense = VccT5(small_t5.GATED, small.vcc(("dense",) * 3))
    found = dense.apply({"params": params}, **plain, method="encode")
    expected = t5.T5(small_t5.GATED).apply({"params": params}, **plain, method="encode")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kinds", "words"),
    [
        (small_t5.RELU, ("vcc",) * 2, "2 layer kinds for model.num_layers=3"),
        (
            dataclasses.replace(small_t5.RELU, encoder_hooks=(hooks.LayerHooks(hooks.Hooks()),)),
            ("vcc",) * 3,
            "leave encoder_hooks empty",
        ),
    ],
)
def test_encoders_that_cannot_be_are_refused(config: Any, kinds: tuple, words: str) -> None:
    ids = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            lambda rng: VccT5(config, small.vcc(kinds)).init(rng, ids, vip_mask=ids),
            jax.random.key(0),
        )


def test_files_of_the_authors_load_and_are_written_alike(params: Any) -> None:
    """They repeat the encoder's one table under every layer."""
    rules = t5_rules(gated=True, tied_head=False, repeated_bias=3)
    tensors = weights.export_weights(params, rules)
    copies = [name for name in tensors if "relative_attention_bias" in name]
    assert len(copies) == 3 + 1
    file = as_tensor_file(tensors)
    family = weights.detect(file)
    assert family.name == "t5" and family.settings(file)["num_layers"] == 3
    again = weights.import_tree(file, family.rules(file))
    pairs = [param_tree.flatten(tree) for tree in (again, params)]
    assert pairs[0].keys() == pairs[1].keys()
    assert all((pairs[0][name] == leaf).all() for name, leaf in pairs[1].items())
    second = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[second] = tensors[second] + 1
    with pytest.raises(weights.WeightsError):
        weights.import_tree(as_tensor_file(tensors), family.rules(file))
