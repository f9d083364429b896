"""Faults of weights files: what does not fit, and what would run code (F36, F37)."""

import json
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.weights import TRANSPOSE, Rule, WeightsError

RULES = (
    Rule("net.{i}.weight", "layers/kernel", TRANSPOSE),
    Rule("net.{i}.bias", "layers/bias"),
    Rule("out.weight", "out/kernel", TRANSPOSE),
)
WIDE = 1000  # a tensor of 4 MB, which would be seen if it were read


def template(layers: int = 2, width: int = WIDE) -> dict:
    shapes = {"layers": {"kernel": (layers, width, width), "bias": (layers, width)},
              "out": {"kernel": (width, 3)}}  # fmt: skip
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def tensors(layers: int = 2) -> dict[str, np.ndarray]:
    found = {"out.weight": np.ones((3, WIDE), np.float32)}
    for i in range(layers):
        found[f"net.{i}.weight"] = np.ones((WIDE, WIDE), np.float32)
        found[f"net.{i}.bias"] = np.ones(WIDE, np.float32)
    return found


def problems(path: pathlib.Path, wanted: dict) -> list[str]:
    """What is said about the file, after checking that no tensor was read meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as caught:
            weights.import_weights(wanted, weights.read(path), RULES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "values were read before the comparison was over"
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems) or [str(caught.value)]


def saved(folder: pathlib.Path, found: dict[str, np.ndarray]) -> pathlib.Path:
    weights.save_safetensors(folder / "model.safetensors", found)
    return folder / "model.safetensors"


def test_f36_missing_extra_and_transposed_tensors_are_listed_by_name(
    tmp_path: pathlib.Path,
) -> None:
    found = tensors()
    del found["net.0.bias"]
    found["stray.weight"] = np.zeros(2, np.float32)
    found["out.weight"] = found["out.weight"].T.copy()
    assert problems(saved(tmp_path, found), template()) == [
        "misshapen: out.weight -> our out/kernel: found shape (1000, 3), wanted (3, 1000) "
        "(transposed?)",
        "missing: net.0.bias -> our layers/bias: wanted shape (1000,)",
        "unexpected: stray.weight",
    ]


def test_f36_the_weights_of_another_config_are_refused_with_every_difference(
    tmp_path: pathlib.Path,
) -> None:
    path = saved(tmp_path, tensors(layers=3))
    said = problems(path, template(layers=2))
    assert said == [
        "unexpected: net.2.bias: the model has no place for it at layers/bias",
        "unexpected: net.2.weight: the model has no place for it at layers/kernel",
    ]
    said = problems(path, template(layers=4, width=512))
    assert sum("misshapen" in line for line in said) == 7
    assert [line for line in said if "missing" in line] == [
        "missing: net.3.bias -> our layers/bias: wanted shape (512,)",
        "missing: net.3.weight -> our layers/kernel: wanted shape (512, 512)",
    ]


def test_f36_an_index_that_names_an_absent_file_is_refused_naming_it(
    tmp_path: pathlib.Path,
) -> None:
    weights.save_safetensors(tmp_path / "1.safetensors", {"out.weight": tensors()["out.weight"]})
    names = {"out.weight": "1.safetensors", "net.0.bias": "2.safetensors", "a": "../3.safetensors"}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": names}))
    assert problems(path, template()) == [
        "'../3.safetensors' is not a plain file name",
        "shard '2.safetensors' is absent",
    ]


def test_f36_a_header_that_promises_more_than_the_file_holds_allocates_nothing(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "m.safetensors"
    for shape, end in (([2**40], 2**42), ([1], 8), ([2**31, 2**31], 2**64)):
        header = {"out.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        problems(path, template())
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    problems(path, template())


class Payload:
    """Would create a file if anything ran it."""

    def __init__(self, target: pathlib.Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "array.npy", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["plain pickle", "torch.save", "npy with objects", "npz"])
def test_f37_no_code_of_a_pickle_runs_whatever_the_file_is_called(
    tmp_path: pathlib.Path, name: str, kind: str
) -> None:
    target, path = tmp_path / "owned", tmp_path / name
    content = {"net.0.weight": Payload(target)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content, 2))
    elif kind == "torch.save":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("m/data.pkl", pickle.dumps(content, 2))
            file.writestr("m/data/0", bytes(4))
    else:
        with open(path, "wb") as file:
            objects = np.array([content], dtype=object)
            if kind == "npz":
                np.savez(file, **{"m": objects})
            else:
                np.save(file, objects, allow_pickle=True)
    with pytest.raises(WeightsError, match="refused|NumPy file|not a checkpoint of torch.save"):
        weights.read(path)
    assert not target.exists()
    os.rename(path, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError):
        weights.read(tmp_path)  # as a model folder
    assert not target.exists()
    pickle.loads(pickle.dumps(content))
    assert target.exists(), "the payload of this test must be a live one"
