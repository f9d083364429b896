"""Key tables of the BERT family against real key lists: the parity files of VCC, and by hand."""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest
from flax.core import meta

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.trunks import bert

SHARED = pathlib.Path(
    os.environ.get("JAXMODELS_SHARED", pathlib.Path(__file__).parents[3] / "shared")
)
SIZES = dict(vocab_size=7, d_model=4, num_layers=2, num_heads=2, d_ff=6, max_positions=5)


@functools.cache
def trunk_template(norm_order: str = "post", pooler: bool = False):
    model = bert.BertModel(bert.BertConfig(norm_order=norm_order, pooler=pooler, **SIZES))
    ids = jax.ShapeDtypeStruct((1, 5), np.int32)
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids))["params"]


def mlm_template(norm_order: str, tied: bool = False):
    head = bert.MLMHead(SIZES["vocab_size"])
    x = jax.ShapeDtypeStruct((1, 4), np.float32)
    head = meta.unbox(jax.eval_shape(head.init, jax.random.key(0), x))["params"]
    if tied:
        del head["decoder"]["kernel"]
    return {"trunk": trunk_template(norm_order), "mlm_head": head}


def fill(template):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), template)


def vcc_file(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    path = SHARED / "parity" / "vcc" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent: set JAXMODELS_SHARED to the folder that holds parity/.")
    with np.load(path) as arrays:
        start = f"params/{prefix}"
        return {key[len(start) :]: arrays[key] for key in arrays.files if key.startswith(start)}


def template_of(tensors, rules) -> dict:
    """The tree that a checkpoint needs, told from its keys alone."""
    depth = 1 + max(int(k.split("layer.")[1].split(".")[0]) for k in tensors if ".layer." in k)
    leaves = {}
    for rule in rules:
        if isinstance(rule, weights.Rule) and rule.source.replace("{i}", "0") in tensors:
            shape = rule.transform.source_shape(tensors[rule.source.replace("{i}", "0")].shape)
            shape = (depth, *shape) if rule.stacked else shape
            leaves[rule.target] = jax.ShapeDtypeStruct(shape, np.float32)
    return params_lib.unflatten(leaves)


@pytest.mark.parametrize(
    ("name", "prefix", "family"),
    [
        ("roberta_mlm_b8", "", "vcc"),
        ("roberta_heads", "", "vcc"),
        ("roberta_dense_baselines", "prenorm.", "vcc"),
        ("roberta_dense_baselines", "postnorm.", "hf_roberta"),
    ],
)
def test_vcc_layouts_are_recognised_and_round_trip(name, prefix, family) -> None:
    tensors = vcc_file(name, prefix)
    # The file of the heads keeps those of three models apart by a prefix of its own.
    for own in ("classification.", "hotpotqa."):
        tensors = {key.removeprefix(own): value for key, value in tensors.items()}
    assert weights.detect_family(tensors) == weights.Layout(family, "roberta.", "")
    rules = weights.rules_for(tensors, {"trunk": {}})
    template = template_of(tensors, rules)
    params = weights.import_weights(template, tensors, rules)
    exported = weights.export_weights(params, rules)
    assert exported.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_vcc_heads_land_in_our_tree() -> None:
    tensors = vcc_file("roberta_heads")
    tensors = {
        k.removeprefix("classification.").removeprefix("hotpotqa."): v for k, v in tensors.items()
    }
    rules = weights.vcc_rules()
    params = weights.import_weights(template_of(tensors, rules), tensors, rules)
    assert params.keys() == {"trunk", "classifier", "classification", "hotpotqa"}
    assert params["classifier"].keys() == {"kernel"}
    assert params["classification"].keys() == {"dense", "out_proj"}
    assert params["hotpotqa"].keys() == {"paragraph", "sentence", "answer_type", "span"}
    kernel = params["hotpotqa"]["answer_type"]["out_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["cls_classifier.2.weight"].T)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_vcc_models_export_and_import_with_our_trees(norm: str) -> None:
    params = fill(mlm_template(norm))
    rules = weights.vcc_rules(norm=norm)
    tensors = weights.export_weights(params, rules)
    assert ("roberta.encoder.layer.1.FFN.3.weight" in tensors) == (norm == "pre")
    template = mlm_template(norm)
    found = weights.import_weights(template, tensors, weights.rules_for(tensors, template))
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("make", [weights.hf_bert_rules, weights.hf_roberta_rules])
def test_a_tied_decoder_is_the_word_embedding_both_ways(make) -> None:
    head, own = ("cls.predictions", "bert.") if make is weights.hf_bert_rules else (
        "lm_head", "roberta.")  # fmt: skip
    params = fill(mlm_template("post", tied=True))
    tensors = weights.export_weights(params, make(prefix=own, trunk="trunk", tied=True))
    word = f"{own}embeddings.word_embeddings.weight"
    assert not any(key.startswith(f"{head}.decoder.") for key in tensors)
    tensors[f"{head}.decoder.weight"] = tensors[word]
    tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
    # Into a tied tree, and without the duplicate into a tree that has its own decoder.
    for tied in (True, False):
        template = mlm_template("post", tied)
        found = weights.import_weights(template, tensors, weights.rules_for(tensors, template))
        np.testing.assert_array_equal(found["trunk"]["embeddings"]["word"]["embedding"],
                                      tensors[word])  # fmt: skip
        tensors.pop(f"{head}.decoder.weight", None)
    np.testing.assert_array_equal(found["mlm_head"]["decoder"]["kernel"], tensors[word].T)


def test_only_the_trunk_of_a_pretraining_checkpoint_on_request() -> None:
    params = fill(mlm_template("post"))
    tensors = weights.export_weights(params, weights.vcc_rules(norm="post"))
    with pytest.raises(weights.WeightsError, match="unexpected: lm_head.dense.weight"):
        weights.import_weights(trunk_template(), tensors, weights.rules_for(tensors))
    rules = weights.rules_for(tensors, optional=("mlm_head",))
    found = weights.import_weights(trunk_template(), tensors, rules)
    jax.tree.map(np.testing.assert_array_equal, found, params["trunk"])


def test_old_bert_names_and_the_next_sentence_head_are_read() -> None:
    params = fill(trunk_template("post", pooler=True))
    tensors = weights.export_weights(params, weights.hf_bert_rules(prefix="bert."))
    old = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for k, v in tensors.items()
    } | {"cls.seq_relationship.weight": np.zeros((2, 4)), "cls.seq_relationship.bias": np.zeros(2)}
    found = weights.import_weights(trunk_template("post", True), old, weights.rules_for(old))
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        (["embeddings.word_embeddings.weight"], ("hf_bert", "", "")),
        (["bert.embeddings.word_embeddings.weight"], ("hf_bert", "bert.", "")),
        (["roberta.embeddings.word_embeddings.weight"], ("hf_roberta", "roberta.", "")),
        (["m.roberta.embeddings.word_embeddings.weight"], ("hf_roberta", "m.roberta.", "m.")),
        (
            ["embeddings.word_embeddings.weight", "encoder.layer.0.FFN.1.weight"],
            ("vcc", "", ""),
        ),
    ],
)
def test_family_and_prefix_are_told_from_the_keys(keys, layout) -> None:
    assert weights.detect_family(keys) == weights.Layout(*layout)


def test_keys_of_no_or_several_trunks_are_refused() -> None:
    with pytest.raises(weights.WeightsError, match="0 trunks"):
        weights.detect_family(["conv1.weight"])
    several = [f"{p}.embeddings.word_embeddings.weight" for p in ("prenorm", "postnorm")]
    with pytest.raises(weights.WeightsError, match=r"2 trunks.*'postnorm\.', 'prenorm\.'"):
        weights.detect_family(several)
    with pytest.raises(weights.WeightsError, match="neither 'pre' nor 'post'"):
        weights.vcc_rules(norm="mid")
