"""Families are told from keys, shapes and config.json; every entry keeps to the registry."""

import os
import pathlib

import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.weights import families
from jaxmodels.weights.tensor_file import as_tensor_file
from tests.weights.test_converted import LAYERS, electra_tensors

SHARED = pathlib.Path(
    os.environ.get("JAXMODELS_SHARED", pathlib.Path(__file__).parents[3] / "shared")
)


def bert_tensors(prefix: str = "") -> dict[str, np.ndarray]:
    tensors = electra_tensors(prefix=prefix)
    return {key: value for key, value in tensors.items() if "embeddings_project" not in key}


@pytest.mark.parametrize(
    ("prefix", "model_type", "wanted"),
    [
        ("", None, "bert"),
        ("bert.", None, "bert"),
        ("roberta.", None, "roberta"),
        ("electra.", None, "electra"),
        ("", "roberta", "roberta"),
        ("", "xlm-roberta", "roberta"),
        ("", "electra", "electra"),
        ("bert.", "roberta", "bert"),
        ("", "something", "bert"),
    ],
)
def test_the_bert_family_is_told_apart(prefix, model_type, wanted) -> None:
    file = as_tensor_file(bert_tensors(prefix))
    file.config = {"model_type": model_type} if model_type else {}
    family = weights.detect(file)
    assert family.name == wanted
    settings = family.settings(file)
    assert settings["position_offset"] == (2 if wanted == "roberta" else 0)
    assert settings["max_positions"] == 7 - settings["position_offset"]
    assert settings["num_layers"] == LAYERS and "num_heads" not in settings
    tensors = bert_tensors(prefix)
    params = weights.import_tree(file, family.rules(file))
    back = weights.export_weights(params, family.rules(file))
    assert back.keys() == tensors.keys()
    assert all(back[key].tobytes() == value.tobytes() for key, value in tensors.items())


def test_only_plain_settings_of_a_config_pass() -> None:
    file = as_tensor_file(bert_tensors())
    file.config = {"num_attention_heads": 4, "layer_norm_eps": [1], "architectures": ["BertModel"]}
    settings = weights.detect(file).settings(file)
    assert settings["num_heads"] == 4 and settings["norm_eps"] == 1e-12


@pytest.mark.parametrize(
    "keys", [[], ["conv.weight"], ["distilbert.embeddings.word_embeddings.weight"]]
)
def test_an_unknown_file_is_refused_with_the_known_families(keys) -> None:
    file = as_tensor_file({key: np.zeros((2, 2), np.float32) for key in keys})
    with pytest.raises(weights.WeightsError, match="is of no known family.*bert, .*electra"):
        weights.detect(file)
    with pytest.raises(weights.WeightsError, match="family 'nothing' is not known. Known: "):
        weights.family_named("nothing")


def test_two_families_as_sure_as_each_other_are_both_named(monkeypatch) -> None:
    same = {name: families.Family(name, lambda file: 1, None, None) for name in ("a", "b")}
    monkeypatch.setattr(families, "known_families", lambda: same)
    with pytest.raises(weights.WeightsError, match="could be any of a, b"):
        weights.detect(as_tensor_file({}))


def test_every_family_answers_for_an_empty_file_and_for_one_of_odd_shapes() -> None:
    empty = as_tensor_file({})
    odd = as_tensor_file({key: np.zeros(3, np.float32) for key in electra_tensors()})
    for name, family in weights.known_families().items():
        assert name == family.name and family.detect(empty) == 0
        if family.detect(odd):
            with pytest.raises(weights.WeightsError, match="misshapen|is no whole"):
                families.settings_of(family, odd)


def test_heads_of_a_file_put_its_trunk_under_trunk() -> None:
    tensors = bert_tensors("bert.")
    head = {"transform.dense.weight": (8, 8), "transform.dense.bias": (8,), "bias": (9,)}
    head |= {"transform.LayerNorm.weight": (8,), "transform.LayerNorm.bias": (8,)}
    tensors |= {f"cls.predictions.{k}": np.ones(shape, np.float32) for k, shape in head.items()}
    tensors |= {"cls.seq_relationship.weight": np.zeros((2, 8), np.float32)}
    # BERT ties its decoder, which the file may then leave out.
    tensors["bert.embeddings.word_embeddings.weight"] = np.ones((9, 8), np.float32)
    for n in ("position", "token_type"):
        tensors[f"bert.embeddings.{n}_embeddings.weight"] = np.ones((7, 8), np.float32)
    for n in ("weight", "bias"):
        tensors[f"bert.embeddings.LayerNorm.{n}"] = np.ones(8, np.float32)
    file = as_tensor_file(tensors)
    params = weights.import_tree(file, weights.detect(file).rules(file))
    assert params.keys() == {"trunk", "mlm_head"}
    assert params["mlm_head"]["decoder"]["kernel"].shape == (8, 9)


def test_the_electra_of_the_parity_file_is_recognised_and_round_trips() -> None:
    path = SHARED / "parity" / "lemda" / "text_encoder_electra.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent: set JAXMODELS_SHARED to the folder that holds parity/.")
    with np.load(path) as arrays:
        start = "params/model."
        tensors = {k[len(start) :]: arrays[k] for k in arrays.files if k.startswith(start)}
    file = as_tensor_file(tensors)
    family = weights.detect(file)
    settings = family.settings(file)
    assert family.name == "electra"
    assert (settings["d_model"], settings["embedding_size"]) == (24, 16)
    params = weights.import_tree(file, family.rules(file))
    assert params["embeddings_project"]["kernel"].shape == (16, 24)
    back = weights.export_weights(params, family.rules(file))
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_settings_that_say_themselves_what_is_missing_are_not_wrapped() -> None:
    def settings(file: weights.TensorFile) -> dict:
        raise weights.WeightsError("head count: put config.json beside the file.")

    family = weights.Family("some", lambda file: 2, lambda file: [], settings)
    with pytest.raises(weights.WeightsError, match="^head count: put config.json"):
        families.settings_of(family, as_tensor_file({}))
    broken = weights.Family("some", lambda file: 2, lambda file: [], lambda file: file.shape("x"))
    with pytest.raises(weights.WeightsError, match="is no whole some model: KeyError"):
        families.settings_of(broken, as_tensor_file({}))
