"""Tied tensors are written once, as `save_pretrained` writes them, and transformers loads them."""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from jaxmodels import weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

T5 = dict(vocab_size=23, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
BART = dict(
    vocab_size=23, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16,
)  # fmt: skip
GPT2 = dict(vocab_size=23, n_embd=8, n_layer=1, n_head=2, n_positions=16)
BERT = dict(
    vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16,
)  # fmt: skip
LLAMA = {k: v for k, v in BERT.items() if k != "max_position_embeddings"}
UNTIED = {"tie_word_embeddings": False}
# By name: the class, its sizes, and the names of state_dict that a file leaves out.
MODELS = {
    "t5": ("T5ForConditionalGeneration", T5, 3),
    "t5_encoder": ("T5EncoderModel", T5, 1),
    "bart": ("BartForConditionalGeneration", BART, 3),
    "gpt2": ("GPT2LMHeadModel", GPT2, 1),
    "llama": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}, 1),
    "bert": ("BertForMaskedLM", BERT, 2),
    "roberta": ("RobertaForMaskedLM", BERT, 2),
    "gpt2_untied": ("GPT2LMHeadModel", GPT2 | UNTIED, 0),
    "bert_untied": ("BertForMaskedLM", BERT | UNTIED, 0),
    "roberta_untied": ("RobertaForMaskedLM", BERT | UNTIED, 0),
}


def made(name: str, sizes: dict[str, Any]) -> Any:
    """A model with random weights; untied ones have tensors that differ."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        state = model.state_dict()
        # They are one tensor in our tree: published files hold the same values under both names.
        for head in ("cls.predictions", "lm_head"):
            if f"{head}.decoder.bias" in state:
                state[f"{head}.decoder.bias"].copy_(state[f"{head}.bias"])
    return model


def written(folder: pathlib.Path, change: Any = None) -> dict[str, np.ndarray]:
    """What we write of the file in `folder`, after a change of our tree."""
    file = weights.read(folder)
    rules = weights.detect(file).rules(file)
    tree = weights.import_tree(file, rules)
    if change:
        change(tree)
    return weights.export_weights(tree, rules)


def assert_loaded(model: Any, folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Asserts that transformers finds the model's tensors, each and no other, in our file."""
    (folder / "model.safetensors").unlink()
    weights.save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_save_pretrained_are_written_and_load_without_missing_ones(
    name: str, tmp_path: pathlib.Path
) -> None:
    cls, sizes, count = MODELS[name]
    model = made(cls, sizes)
    model.save_pretrained(tmp_path)
    file = {key: value.copy() for key, value in weights.read(tmp_path).items()}
    assert len(model.state_dict()) - len(file) == count
    once = written(tmp_path)
    assert once.keys() == file.keys()
    for key, value in file.items():
        assert once[key].dtype == value.dtype and once[key].tobytes() == value.tobytes(), key
    assert_loaded(model, tmp_path, once)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama", "bert", "roberta"])
def test_a_file_with_all_names_becomes_one_with_each_tensor_once(
    name: str, tmp_path: pathlib.Path
) -> None:
    cls, sizes, count = MODELS[name]
    model = made(cls, sizes)
    model.save_pretrained(tmp_path)
    once = {key: value.copy() for key, value in written(tmp_path).items()}
    full = {key: value.numpy() for key, value in model.state_dict().items()}
    assert len(full) - len(once) == count
    (tmp_path / "model.safetensors").unlink()
    weights.save_safetensors(tmp_path / "model.safetensors", full)
    back = written(tmp_path)
    assert back.keys() == once.keys()
    jax.tree.map(np.testing.assert_array_equal, back, once)
    # Without config.json too, where the family does not need one: nothing of it may get lost.
    if name in ("bert", "roberta"):
        shutil.move(tmp_path / "config.json", tmp_path / "other.json")
        assert written(tmp_path).keys() == full.keys()


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_head_trained_away_from_the_word_table_is_written_and_loads(
    name: str, tmp_path: pathlib.Path
) -> None:
    model = made(*MODELS[name][:2])
    model.save_pretrained(tmp_path)

    def train(tree: dict[str, Any]) -> None:
        tree["mlm_head"]["decoder"]["kernel"] = tree["mlm_head"]["decoder"]["kernel"] + 1

    tensors = written(tmp_path, train)
    decoder = "cls.predictions.decoder" if name == "bert" else "lm_head.decoder"
    state = model.state_dict()
    words = next(key for key in state if key.endswith("word_embeddings.weight"))
    np.testing.assert_array_equal(tensors[f"{decoder}.weight"], state[words].numpy() + 1)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight + 1)
    assert_loaded(model, tmp_path, tensors)
