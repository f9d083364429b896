"""GPT-2, Llama, Qwen2 and Mistral of transformers: the same numbers and tokens from their files."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from jaxmodels.trunks import decoder_lm
from tests.trunks import hugging_face

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SMALL = dict(
    vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)


def gpt2(**more: Any) -> Any:
    config = dict(vocab_size=53, n_embd=24, n_layer=2, n_head=3, n_positions=32)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | more))


def llama(kind: str = "Llama", **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SMALL | more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


MODELS = {
    "gpt2": gpt2,
    "gpt2_wide": functools.partial(gpt2, n_inner=20, activation_function="relu"),
    "llama": llama,
    "llama_tied": functools.partial(llama, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama3": functools.partial(llama, num_key_value_heads=2, head_dim=10, rope_parameters=LLAMA3),
    "llama_biases": functools.partial(llama, attention_bias=True, mlp_bias=True),
    "qwen2": functools.partial(llama, "Qwen2", num_key_value_heads=2),
    "mistral": functools.partial(llama, "Mistral", num_key_value_heads=1, sliding_window=None),
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 53, (2, 11))
MASK = np.ones((2, 11), int)
MASK[1, :4] = 0
POSITIONS = np.maximum(MASK.cumsum(1) - 1, 0)


def ours(name: str, folder: pathlib.Path) -> tuple[Any, Any, Any]:
    """Hugging Face's model, ours, and our parameters."""
    model = hugging_face.randomized(MODELS[name]())
    family, settings, variables = hugging_face.loaded(model, folder)
    assert family == ("gpt2" if name.startswith("gpt2") else "llama")
    return model, decoder_lm.DecoderLM(decoder_lm.DecoderConfig(**settings)), variables


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_from_a_file(name: str, tmp_path: pathlib.Path) -> None:
    theirs, model, variables = ours(name, tmp_path)
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS}
    expected = hugging_face.run(theirs, **given).logits.numpy()[MASK == 1]
    found = np.asarray(jax.jit(model.apply)(variables, IDS, MASK))[MASK == 1]
    # float32 sums in another order.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_generated_tokens_are_hugging_faces(
    name: str, num_beams: int, tmp_path: pathlib.Path
) -> None:
    theirs, model, variables = ours(name, tmp_path)
    settings = {"max_new_tokens": 7, "num_beams": num_beams, "pad_token_id": 1}
    settings |= {"eos_token_id": int(IDS[0, 0]), "repetition_penalty": 1.2}
    expected = hugging_face.generate(theirs, IDS, MASK, **settings)
    found = hugging_face.our_generation(model, variables, IDS, MASK, **settings)
    hugging_face.same_sequences(found, expected, pad_id=1)


def test_the_loss_of_labels_is_hugging_faces(tmp_path: pathlib.Path) -> None:
    theirs, model, variables = ours("gpt2", tmp_path)
    labels = np.where(np.arange(11) < 3, -100, IDS)
    expected = float(hugging_face.run(theirs, input_ids=IDS, labels=labels).loss)
    hidden = model.apply(variables, IDS, method="decode")
    kernel = model.bind(variables).head_kernel()
    found, _ = decoder_lm.token_log_probs(hidden[:, :-1], kernel, labels[:, 1:], chunk=4)
    assert -float(found.sum()) / (labels[:, 1:] >= 0).sum() == pytest.approx(expected, rel=1e-5)


def test_a_prefix_of_gpt2_is_its_past_key_values(tmp_path: pathlib.Path) -> None:
    from jaxmodels.core import hooks
    from tests.trunks import hook_cases

    theirs, model, variables = ours("gpt2", tmp_path)
    prefix = RNG.normal(size=(2, 2, 3, 3, 8)).astype(np.float32)  # layer, key or value, place, head
    past = transformers.DynamicCache()
    for layer, pair in enumerate(torch.from_numpy(prefix)):
        key, value = (x.permute(1, 0, 2).expand(2, -1, -1, -1).clone() for x in pair)
        past.update(key, value, layer)
    with torch.no_grad():
        mask = torch.tensor(np.pad(MASK[:, ::-1], ((0, 0), (3, 0)), constant_values=1).copy())
        expected = theirs(torch.tensor(IDS), attention_mask=mask, past_key_values=past).logits
    group = (hooks.LayerHooks(hook_cases.Prefix(3)),)
    config = decoder_lm.DecoderConfig(**{**vars(model.config), "layer_hooks": group})
    tree = variables["params"]
    tree = tree | {"decoder": tree["decoder"] | {"hooks_0": {"attention": prefix}}}
    positions = np.broadcast_to(np.arange(3, 14), IDS.shape)
    found = decoder_lm.DecoderLM(config).apply(
        {"params": tree}, IDS, MASK[:, ::-1], position_ids=positions
    )
    real = MASK[:, ::-1] == 1
    np.testing.assert_allclose(found[real], expected.numpy()[real], rtol=1e-4, atol=1e-4)
