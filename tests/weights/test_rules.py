"""The mapping engine: every fault is listed, nothing is loaded half, and round trips are exact."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.weights import IDENTITY, TRANSPOSE, Ignore, Rule
from jaxmodels.weights.rules import per_stage, with_prefix

RULES = (
    Rule("net.{i}.weight", "layers/kernel", TRANSPOSE),
    Rule("net.{i}.bias", "layers/bias"),
    Rule("head.bias", "head/bias", aliases=("head.decoder.bias",)),
    Rule("norm.weight", "norm/scale", fallbacks=("norm.gamma",)),
    Rule("pool.weight", "pool/kernel", TRANSPOSE, optional=True),
    Ignore("position_ids"),
    Ignore("net.{i}.buffer.*"),
)


def template(layers: int = 2, dtype=np.float32):
    shapes = {
        "layers": {"kernel": (layers, 3, 4), "bias": (layers, 4)},
        "head": {"bias": (5,)},
        "norm": {"scale": (3,)},
    }
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def foreign(layers: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {"head.bias": (5,), "head.decoder.bias": (5,), "norm.weight": (3,)}
    for i in range(layers):
        tensors |= {f"net.{i}.weight": (4, 3), f"net.{i}.bias": (4,)}
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    return values | {"head.decoder.bias": values["head.bias"]}


def test_stacked_and_transposed_tensors_land_in_their_layer() -> None:
    tensors = foreign(12)
    params = weights.import_weights(template(12), tensors, RULES)
    for i in range(12):
        np.testing.assert_array_equal(params["layers"]["kernel"][i], tensors[f"net.{i}.weight"].T)
        np.testing.assert_array_equal(params["layers"]["bias"][i], tensors[f"net.{i}.bias"])


def test_import_then_export_is_bit_exact_and_writes_tied_tensors_once() -> None:
    tensors = foreign()
    tensors["norm.weight"][0] = np.nan
    exported = weights.export_weights(weights.import_weights(template(), tensors, RULES), RULES)
    assert exported.keys() == tensors.keys() - {"head.decoder.bias"}
    for name in exported:
        value = tensors[name]
        assert exported[name].dtype == value.dtype
        np.testing.assert_array_equal(exported[name].tobytes(), value.tobytes(), err_msg=name)


def test_all_faults_are_listed_at_once_by_both_names() -> None:
    tensors = foreign(3)
    del tensors["net.0.bias"], tensors["norm.weight"]
    tensors["net.1.weight"] = tensors["net.1.weight"].T
    tensors["head.decoder.bias"] = tensors["head.bias"] + 1
    tensors["net.1.bias"] = np.zeros(4, np.int64)
    tensors |= {"stray": np.zeros(1), "pool.bias": np.zeros(1)}
    wanted = template() | {"extra": jax.ShapeDtypeStruct((7,), np.float32)}
    with pytest.raises(weights.WeightsError) as error:
        weights.import_weights(wanted, tensors, RULES)
    assert list(error.value.problems) == [
        "misshapen: net.1.weight -> our layers/kernel: found shape (3, 4), wanted (4, 3) "
        "(transposed?)",
        "missing: net.0.bias -> our layers/bias: wanted shape (4,)",
        "missing: no rule gives our extra (shape (7,))",
        "missing: norm.weight -> our norm/scale: wanted shape (3,)",
        "unequal: head.decoder.bias and head.bias must be the same tensor (our head/bias)",
        "unexpected: net.2.bias: the model has no place for it at layers/bias",
        "unexpected: net.2.weight: the model has no place for it at layers/kernel",
        "unexpected: pool.bias",
        "unexpected: stray",
        "wrong dtype: net.1.bias -> our layers/bias: found int64, wanted float32",
    ]
    assert all(problem in str(error.value) for problem in error.value.problems)


def test_a_wrong_file_fails_before_any_value_is_read() -> None:
    def explode() -> np.ndarray:
        raise AssertionError("a value was read")

    entry = weights.Entry((4, 3), np.dtype(np.float32), explode)
    file = weights.TensorFile("file", {f"net.{i}.weight": entry for i in range(2)})
    with pytest.raises(weights.WeightsError, match="nothing was loaded"):
        weights.import_weights(template(), file, RULES)


def test_either_alias_and_the_fallback_name_are_read() -> None:
    wanted = weights.import_weights(template(), foreign(), RULES)
    tensors = foreign()
    del tensors["head.bias"]
    tensors["norm.gamma"] = tensors.pop("norm.weight")
    found = weights.import_weights(template(), tensors, RULES)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    # Both names at once: one of them is wrong, so neither is silently taken.
    with pytest.raises(weights.WeightsError, match="unexpected: norm.gamma"):
        weights.import_weights(template(), foreign() | {"norm.gamma": np.zeros(3)}, RULES)


def test_ignored_and_optional_keys_may_be_there() -> None:
    extra = {"position_ids": np.arange(3), "net.1.buffer.x": np.ones(1), "pool.weight": np.ones(2)}
    weights.import_weights(template(), foreign() | extra, RULES)


def test_floats_take_the_templates_dtype_or_the_one_asked_for() -> None:
    half = {name: value.astype(np.float16) for name, value in foreign().items()}
    params = weights.import_weights(template(), half, RULES)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    params = weights.import_weights(template(), foreign(), RULES, dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_imported_arrays_survive_the_file(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    weights.save_safetensors(path, foreign())
    params = weights.import_weights(template(), weights.read(path), RULES)
    path.write_bytes(b"")
    np.testing.assert_array_equal(params["norm"]["scale"], foreign()["norm.weight"])
    params["norm"]["scale"][:] = 0


def test_export_lists_leaves_without_rule_and_double_writes() -> None:
    params = {"norm": {"scale": np.ones(3), "b": np.ones(2)}, "c": np.ones(2)}
    twice = (*RULES, Rule("norm.weight", "c", IDENTITY))
    with pytest.raises(weights.WeightsError) as error:
        weights.export_weights(params, twice)
    assert error.value.problems == ("no rule for our norm/b", "norm.weight would be written twice")


def test_copies_are_written_under_the_names_of_with_prefix_and_per_stage() -> None:
    rules = [Rule("{s}.a", "a_{s}", aliases=("{s}.b", "{s}.c"), copies=("{s}.c",))]
    rules = with_prefix(per_stage(rules, range(2)), "x.", "ours/")
    params = {"ours": {"a_0": np.zeros(2), "a_1": np.ones(2)}}
    exported = weights.export_weights(params, rules)
    assert {key: value[0] for key, value in exported.items()} == {
        "x.0.a": 0, "x.0.c": 0, "x.1.a": 1, "x.1.c": 1,
    }  # fmt: skip
    with pytest.raises(weights.WeightsError, match="'a': copies=.'c',. must be among its aliases"):
        Rule("a", "a", aliases=("b",), copies=("c",))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_tensor_is_left_out_only_if_its_fallback_holds_the_same_bits(shift: int) -> None:
    rules = (
        Rule("words", "words"),
        Rule("head", "head", TRANSPOSE, fallbacks=("first", "words")),
    )
    words = np.arange(6, dtype=np.float32).reshape(2, 3)
    words[0, 0] = np.nan
    head = words.T.copy()
    head[2, 1] += shift
    params = {"words": words, "head": head}
    exported = weights.export_weights(params, rules)
    assert exported.keys() == ({"words", "head"} if shift else {"words"})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    jax.tree.map(
        np.testing.assert_array_equal, weights.import_weights(shapes, exported, rules), params
    )
    narrow = {"words": words, "head": head.astype(np.float16)}
    assert weights.export_weights(narrow, rules).keys() == {"words", "head"}


def test_a_rule_stacked_in_only_some_keys_is_refused() -> None:
    with pytest.raises(weights.WeightsError, match="once in every key"):
        Rule("a.{i}", "a", aliases=("b",))
