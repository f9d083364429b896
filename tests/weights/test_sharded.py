"""Loading onto a mesh: equal to loading on the host, in the memory of one shard."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxmodels import weights
from tests.train.runs import python
from tests.weights import sharded_script

HAS_ANONYMOUS = pathlib.Path("/proc/self/status").exists()


@pytest.fixture(scope="module")
def big_file(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("big") / "model.safetensors"
    weights.save_safetensors(path, sharded_script.tensors())
    return path


def report(*arguments, devices: int = 8, **environment: str) -> dict:
    script = ("-m", "tests.weights.sharded_script", *map(str, arguments))
    done = python(*script, devices=devices, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ANONYMOUS, reason="memory is told by /proc")
@pytest.mark.parametrize("devices", [1, 8])
def test_a_load_holds_one_shard_besides_what_is_placed(big_file, devices) -> None:
    found = report(big_file, "sharded", devices=devices)
    assert found["equal"] and found["sharded"] and found["donated"]
    assert found["peak"] > 0.95 * found["placed"], "this memory is not seen by the measure"
    # Freed blocks that the C library kept were half a shard; the whole model would be four.
    assert found["peak"] - found["placed"] < 1.3 * found["largest_shard"], found


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ANONYMOUS, reason="memory is told by /proc")
def test_a_conversion_holds_some_leaves_and_never_the_model(big_file, tmp_path) -> None:
    # One arena: what glibc keeps of freed memory, for each of orbax's threads, is not what is held.
    found = report(big_file, "convert", tmp_path / "out", MALLOC_ARENA_MAX="1")
    # Read, and encoded for the disk; the file is six times the largest leaf.
    assert found["peak"] < 3.5 * found["largest_leaf"], found


def test_only_the_slices_of_this_process_are_read(tmp_path) -> None:
    reads = []

    class Recorded(np.ndarray):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    value = np.arange(24.0, dtype=np.float32).reshape(4, 6).view(Recorded)
    entry = weights.Entry(value.shape, value.dtype, lambda: value)
    file = weights.TensorFile("file", {"x": entry})
    rules = [weights.Rule("x", "x", weights.TRANSPOSE)]
    source = weights.leaf_sources({"x": jax.ShapeDtypeStruct((6, 4), np.float32)}, file, rules)
    piece = source["x"].read((slice(2, 4), slice(0, 4)))
    assert reads == [(slice(2, 4), slice(0, 4))]
    np.testing.assert_array_equal(piece, np.asarray(value).T[2:4])


def test_a_cpu_device_takes_what_was_read_and_makes_no_copy() -> None:
    if jax.default_backend() != "cpu":  # asked here: collecting tests starts no backend
        pytest.skip("other devices have their own memory")
    shape = (3, 700, 300)
    tensors = {f"n.{i}": np.full(shape[:0:-1], i, np.float32) for i in range(3)}
    template = {"n": jax.ShapeDtypeStruct(shape, np.float32)}
    rules = [weights.Rule("n.{i}", "n", weights.TRANSPOSE)]
    values = weights.leaf_sources(template, tensors, rules)["n"].read()
    placed = jax.device_put(values)
    assert placed.unsafe_buffer_pointer() == values.ctypes.data
    assert values.flags.writeable and values.tolist()[2][1][:2] == [2.0, 2.0]


def test_without_sharding_leaves_go_to_the_default_device_in_the_templates_dtype() -> None:
    rules = [weights.Rule("n.{i}", "n"), weights.Rule("b", "b")]
    tensors = {f"n.{i}": np.full(3, i, np.float16) for i in range(2)} | {"b": np.float16(7)}
    template = {
        "n": jax.ShapeDtypeStruct((2, 3), np.float32),
        "b": jax.ShapeDtypeStruct((), np.float32),
    }
    params = weights.load_sharded(template, tensors, rules)
    assert params["n"].devices() == {jax.devices()[0]} and params["n"].dtype == np.float32
    assert params["n"].tolist() == [[0.0] * 3, [1.0] * 3] and params["b"] == 7


def test_a_wrong_file_is_refused_before_a_value_is_read() -> None:
    def explode() -> np.ndarray:
        raise AssertionError("a value was read")

    file = weights.TensorFile("f", {"x": weights.Entry((3,), np.dtype(np.float32), explode)})
    template = {"x": jax.ShapeDtypeStruct((4,), np.float32)}
    with pytest.raises(weights.WeightsError, match="misshapen: x"):
        weights.load_sharded(template, file, [weights.Rule("x", "x")])
