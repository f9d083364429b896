"""Files of BART, GPT-2 and Llama: written back bit for bit; other formulas refused by name."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as param_tree
from jaxmodels.core import partitioning
from jaxmodels.trunks import bart, decoder_lm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BART = dict(
    vocab_size=23, d_model=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16,
)  # fmt: skip
GPT2 = dict(vocab_size=23, n_embd=8, n_layer=2, n_head=2, n_positions=16)
LLAMA = dict(
    vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4
)
MODELS = {
    "bart_bare": ("Bart", "Model", BART),
    "bart": ("Bart", "ForConditionalGeneration", BART),
    "bart_classifier": ("Bart", "ForSequenceClassification", BART),
    "mbart": ("MBart", "ForConditionalGeneration", BART),
    "gpt2_bare": ("GPT2", "Model", GPT2),
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gpt2_untied": ("GPT2", "LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
    "llama_bare": ("Llama", "Model", LLAMA),
    "llama": ("Llama", "ForCausalLM", LLAMA | {"num_key_value_heads": 2}),
    "llama_tied": ("Llama", "ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", "ForCausalLM", LLAMA | {"num_key_value_heads": 2}),
}


def saved(kind: str, name: str, sizes: dict[str, Any], folder: pathlib.Path, **save: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}{name}")(config)
    model.save_pretrained(folder, **save)
    return model


def template(family: str, settings: dict[str, Any]) -> Any:
    """Our tree's shapes for the settings that were told."""
    if family == "bart":
        model: Any = bart.BartModel(bart.BartConfig(**settings))
    else:
        model = decoder_lm.DecoderLM(decoder_lm.DecoderConfig(**settings))
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    return partitioning.unbox(jax.eval_shape(model.init, jax.random.key(0), ids))["params"]


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_written_back_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    saved(*MODELS[name], tmp_path, max_shard_size="4KB")
    file = weights.read(tmp_path)
    family = weights.detect(file)
    rules = family.rules(file)
    tree = weights.import_tree(file, rules)
    back = weights.export_weights(tree, rules)
    assert sorted(back) == sorted(file)
    for key in file:
        np.testing.assert_array_equal(back[key], file[key], err_msg=key)
    wanted = template(family.name, family.settings(file))
    trunk = tree.get("trunk", tree)
    found = {path: np.shape(leaf) for path, leaf in param_tree.flatten(trunk).items()}
    shapes = {path: leaf.shape for path, leaf in param_tree.flatten(wanted).items()}
    if name == "llama_bare":  # has no head, and says that the word table is none
        shapes.pop("lm_head/kernel")
    assert found == shapes
    if name == "bart_classifier":
        assert set(tree) == {"trunk", "classification"}


def test_tied_names_of_an_old_file_are_read_from_any_and_must_agree(tmp_path: Any) -> None:
    model = saved("Bart", "ForConditionalGeneration", BART, tmp_path)
    tensors = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    tied = [key for key in tensors if key.endswith(("shared.weight", "embed_tokens.weight"))]
    assert len(tied) == 3 and "lm_head.weight" in tensors
    path = tmp_path / "model.safetensors"
    path.unlink()
    weights.save_safetensors(path, tensors)
    file = weights.read(path)
    rules = weights.detect(file).rules(file)
    back = weights.export_weights(weights.import_tree(file, rules), rules)
    assert set(tensors) - set(back) == {*tied[1:], "lm_head.weight"}
    only = {key: value for key, value in tensors.items() if key not in [*tied, "lm_head.weight"]}
    only["model.decoder.embed_tokens.weight"] = tensors[tied[0]]
    path.unlink()
    weights.save_safetensors(path, only)
    file = weights.read(path)
    tree = weights.import_tree(file, weights.detect(file).rules(file))
    np.testing.assert_array_equal(tree["shared"]["embedding"], tensors[tied[0]])
    tensors["lm_head.weight"][3, 3] += 1
    path.unlink()
    weights.save_safetensors(path, tensors)
    file = weights.read(path)
    with pytest.raises(weights.WeightsError, match="lm_head.weight"):
        weights.import_tree(file, weights.detect(file).rules(file))


def test_settings_of_llama_come_from_shapes_and_config(tmp_path: pathlib.Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 2.0,
        "high_freq_factor": 5.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    sizes = LLAMA | {"num_key_value_heads": 2, "head_dim": 6, "rope_parameters": rope}
    saved("Llama", "ForCausalLM", sizes | {"rms_norm_eps": 1e-3}, tmp_path)
    expected = {
        "vocab_size": 23, "d_model": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 6, "d_ff": 12, "max_positions": 2048, "norm": "rms", "norm_eps": 1e-3,
        "activation": "silu", "gated": True, "use_bias": False, "qkv_bias": False,
        "tied_head": False, "rope_theta": 500.0, "rope_factor": 8.0,
        "rope_low_frequency_factor": 2.0, "rope_high_frequency_factor": 5.0,
        "rope_original_length": 64, "dropout_rate": 0.0, "attention_dropout_rate": 0.0,
    }  # fmt: skip
    file = weights.read(tmp_path)
    assert weights.detect(file).settings(file) == expected
    # The older form of config.json: theta beside the scaling.
    change(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=without_theta(rope))
    file = weights.read(tmp_path)
    assert weights.detect(file).settings(file) == expected


def without_theta(rope: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rope.items() if name != "rope_theta"}


def change(folder: pathlib.Path, **settings: Any) -> None:
    """Writes other values into config.json; None takes a setting out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"model_type": "gemma"}, "model_type='gemma'"),
        ("llama", {"model_type": "granite"}, "model_type='granite'"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"model_type": "imagegpt"}, "model_type='imagegpt'"),
        ("bart", {"model_type": "blenderbot-small"}, "model_type='blenderbot-small'"),
        ("bart", {"static_position_embeddings": True}, "static_position_embeddings=True"),
        ("bart", {"decoder_attention_heads": 4}, "decoder_attention_heads=4"),
    ],
)
def test_other_formulas_under_the_same_keys_are_refused_by_name(
    name: str, settings: dict[str, Any], words: str, tmp_path: pathlib.Path
) -> None:
    saved(*MODELS[name], tmp_path)
    file = weights.read(tmp_path)
    assert weights.detect(file).rules(file)
    change(tmp_path, **settings)
    file = weights.read(tmp_path)
    family = weights.detect(file)
    for look in (family.rules, family.settings):
        with pytest.raises(weights.WeightsError, match=words):
            look(file)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("bart", "encoder_attention_heads"),
        ("gpt2", "n_head"),
        ("llama", "num_attention_heads"),
    ],
)
def test_head_counts_are_asked_for_where_no_config_tells_them(
    name: str, key: str, tmp_path: pathlib.Path
) -> None:
    saved(*MODELS[name], tmp_path)
    (tmp_path / "config.json").unlink()
    file = weights.read(tmp_path / "model.safetensors")
    family = weights.detect(file)
    assert weights.import_tree(file, family.rules(file))  # the table needs no config
    with pytest.raises(weights.WeightsError, match=f"config.json gives {key}=None"):
        family.settings(file)


def test_head_counts_of_another_model_and_half_biases_are_refused(tmp_path: pathlib.Path) -> None:
    saved(*MODELS["llama"], tmp_path)
    change(tmp_path, num_attention_heads=3)
    file = weights.read(tmp_path)
    with pytest.raises(weights.WeightsError, match="which 3 heads do not divide"):
        weights.detect(file).settings(file)
    saved("Llama", "ForCausalLM", LLAMA | {"attention_bias": True}, tmp_path)
    file = weights.read(tmp_path)
    with pytest.raises(weights.WeightsError, match="some have biases and some have not"):
        weights.detect(file).rules(file)


def test_buffers_of_old_files_are_passed_over(tmp_path: pathlib.Path) -> None:
    old = {
        "gpt2": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
        "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
        "bart": ("model.encoder.version",),
    }
    for name, keys in old.items():
        model = saved(*MODELS[name], tmp_path / name)
        tensors = {key: value.numpy() for key, value in model.state_dict().items()}
        file = tmp_path / name / "old.safetensors"
        weights.save_safetensors(file, tensors | {key: np.ones(3, np.float32) for key in keys})
        opened = weights.read(file)
        tree = weights.import_tree(opened, weights.detect(opened).rules(opened))
        assert len(param_tree.flatten(tree)) > 10
