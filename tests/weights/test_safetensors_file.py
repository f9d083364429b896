"""Safetensors files and shard indexes: read and written right, and every damage refused by name."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmodels import weights
from jaxmodels.weights import __main__ as command
from jaxmodels.weights import safetensors_file

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path, header, data: bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=(3, 4)).astype(dtype)
        for name, dtype in safetensors_file._DTYPES.items()
    }
    transposed = rng.normal(size=(3, 5)).astype(np.float32).T
    return tensors | {"t": transposed, "none": np.zeros((0, 4), np.float32), "0d": np.float32(7.0)}


def assert_same(found, wanted) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        value = np.asarray(value)
        assert found.shape(name) == value.shape and found.dtype(name) == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_every_dtype_and_layout_round_trips(tmp_path) -> None:
    weights.save_safetensors(tmp_path / "m.safetensors", example(), {"format": "pt"})
    found = weights.read(tmp_path / "m.safetensors")
    assert_same(found, example())
    assert found.metadata == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_agrees_with_the_safetensors_package_both_ways(tmp_path) -> None:
    theirs = pytest.importorskip("safetensors.numpy")
    tensors = {k: np.asarray(v) for k, v in example().items() if not k.startswith(("BF16", "F8"))}
    contiguous = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}
    theirs.save_file(contiguous, tmp_path / "theirs.safetensors")
    assert_same(weights.read(tmp_path / "theirs.safetensors"), tensors)
    weights.save_safetensors(tmp_path / "ours.safetensors", tensors)
    for name, value in theirs.load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])


def test_values_are_views_of_the_file_and_cannot_be_written(tmp_path) -> None:
    weights.save_safetensors(tmp_path / "m", {"a": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="read-only"):
        weights.read(tmp_path / "m")["a"][0] = 2


@pytest.mark.parametrize("cut", [1, 7, 8, 30, 50, 90, -1])
def test_a_cut_file_is_refused(tmp_path, cut: int) -> None:
    path = write(tmp_path / "m.safetensors", GOOD, bytes(24))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(weights.WeightsError, match=r"m\.safetensors"):
        weights.read_safetensors(path)


def changed(**fields) -> dict:
    return {"a": GOOD["a"] | fields}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed(dtype="F33"), "'F33' is not one of"),
        (changed(dtype=["F32"]), "is not one of"),
        (changed(shape=[2, 4]), "does not take the bytes"),
        (changed(shape=[-2, -3]), "whole numbers"),
        (changed(shape=[True, 6]), "whole numbers"),
        (changed(shape=[2.0, 3]), "whole numbers"),
        (changed(shape=[2**62, 2**62, 0, 1]), "does not take"),
        (changed(data_offsets=[4, 28]), "starts at byte 4"),
        (changed(data_offsets=[24, 0]), "does not take"),
        (changed(data_offsets=[0]), "whole numbers"),
        (changed(extra=1), "exactly dtype"),
        ({"a": 3}, "exactly dtype"),
        (GOOD | {"b": GOOD["a"]}, "'b' starts at byte 0; the tensor before ends at 24"),
        ({}, "end at byte 0, the data at 24"),
        (GOOD | {"__metadata__": {"k": 1}}, "__metadata__ must map"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b"{" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{\xff}", "not valid JSON"),
        (b"[1]", "JSON object"),
    ],
)
def test_a_wrong_header_is_refused_with_its_reason(tmp_path, header, message: str) -> None:
    with pytest.raises(weights.WeightsError, match=message):
        weights.read_safetensors(write(tmp_path / "m.safetensors", header, bytes(24)))


def test_a_bool_that_is_neither_0_nor_1_is_refused(tmp_path) -> None:
    header = {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    tensors = weights.read(write(tmp_path / "m", header, b"\x01\x02"))
    with pytest.raises(weights.WeightsError, match="other than 0 and 1"):
        tensors["a"]


@FUZZ
@given(text=st.binary(max_size=200), data=st.binary(max_size=64), length=st.integers(0, 300))
def test_garbage_headers_raise_only_weights_errors(tmp_path, text, data, length) -> None:
    path = tmp_path / "m.safetensors"
    for content in (struct.pack("<Q", length) + text + data, text):
        path.write_bytes(content)
        for reader in (weights.read_safetensors, weights.read):
            try:
                dict(reader(path))
            except weights.WeightsError:
                pass


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1))
def test_flipped_header_bytes_raise_only_weights_errors(tmp_path, flips) -> None:
    path = tmp_path / "m.safetensors"
    weights.save_safetensors(path, example())
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        dict(weights.read_safetensors(path))
    except weights.WeightsError:
        pass


def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path) -> None:
    bad = {"c": np.zeros(2, np.complex64), "o": np.array([None]), "__metadata__": np.zeros(1)}
    with pytest.raises(weights.WeightsError) as error:
        weights.save_safetensors(tmp_path / "m", bad, {"k": 1})
    assert len(error.value.problems) == 4
    assert not list(tmp_path.iterdir())


def shards(folder, weight_map) -> None:
    weights.save_safetensors(folder / "1.safetensors", {"a": np.ones(2, np.float32)})
    weights.save_safetensors(folder / "2.safetensors", {"b": np.ones(3, ml_dtypes.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one_file_from_index_or_folder(tmp_path) -> None:
    shards(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        tensors = weights.read(path)
        assert list(tensors) == ["b", "a"]
        assert tensors.shape("b") == (3,) and tensors["b"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "3.safetensors", "b": "4.safetensors"}, "'3.safetensors' is absent\n.*'4.*absent"),
        ({"a": "../1.safetensors"}, "'../1.safetensors' is not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain"),
        ({"a": "sub\\1.safetensors"}, "not a plain"),
        ({"a": ".."}, "not a plain"),
        ({"a": ""}, "not a plain"),
        ({"a": 3}, "absent"),
        ({"a": "model.safetensors.index.json"}, "index in place"),
        ({"a": "1.safetensors", "c": "1.safetensors"}, "'c' is not in shard '1.safetensors'"),
        ({"c": "1.safetensors"}, "'a' of '1.safetensors' is not in the index"),
        ({}, "no 'weight_map'"),
        (["a"], "no 'weight_map'"),
    ],
)
def test_a_wrong_index_is_refused_with_all_its_faults(tmp_path, weight_map, message) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\x93NUMPY\x01\x00", "NumPy file"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x80\x02}q\x00.", "plain pickle.*safetensors.torch.save_file"),
        (bytes(257) + b"ustar" + bytes(250), "tar file.*safetensors.torch.save_file"),
        (b"garbage!", "unknown format"),
        (b"PK\x03\x04 garbage", "not a readable zip"),
    ],
)
def test_other_formats_are_refused_with_what_to_do(tmp_path, content, message) -> None:
    # The name promises safetensors: only the content counts.
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(tmp_path / "model.safetensors")


def test_an_absent_file_and_an_empty_folder_are_named(tmp_path) -> None:
    with pytest.raises(weights.WeightsError, match="no such file"):
        weights.read(tmp_path / "absent")
    with pytest.raises(weights.WeightsError, match="holds none of model.safetensors"):
        weights.read(tmp_path)


def test_inspect_prints_names_and_totals(tmp_path, capsys) -> None:
    path = write(tmp_path / "m.safetensors", GOOD, bytes(24))
    assert command.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a  float32     [2, 3]", "1 tensors, 6 values, 24 bytes"]
    assert lines[2].startswith("family: not known")
    assert command.main(["inspect", str(tmp_path / "absent")]) == 1
    assert "no such file" in capsys.readouterr().err
