"""The benchmark of loading: all sides load the same numbers, and what is told is of the load."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import load, load_sides, measure
from jaxmodels.core import params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    assert load_sides.write_checkpoint(folder, "small") > 100_000
    return folder


def found():
    """Results made up: one side could not run, one system tells no memory."""
    one = {"seconds": 0.5, "ratio": 1.0, "beyond_mb": 1.25, "held_mb": 438.0, "skipped": None}
    other = one | {"seconds": 1.5, "ratio": 3.0, "beyond_mb": None}
    return {"ours": one, "naive": other, "transformers": {"skipped": "torch not installed"}}


def test_ours_sharded_or_not_and_the_naive_way_load_the_same_numbers(checkpoint):
    pytest.importorskip("safetensors")
    ours = params.flatten(load_sides.ours("small")(checkpoint))
    sharded = params.flatten(load_sides.ours_sharded("small")(checkpoint))
    naive = load_sides.naive("small")(checkpoint)
    assert ours.keys() == sharded.keys() and len(ours) == len(naive)
    for path, value in ours.items():
        assert isinstance(sharded[path], jax.Array)
        np.testing.assert_array_equal(value, sharded[path])
    query = naive["encoder.layer.*.attention.self.query.weight"]
    np.testing.assert_array_equal(ours["encoder/layers/attention/query/kernel"], query)


def test_transformers_finds_every_tensor_of_the_file(checkpoint):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    model, told = transformers.BertModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    word = model.state_dict()["embeddings.word_embeddings.weight"]
    ours = load_sides.ours("small")(checkpoint)["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(word.numpy(), ours)


def test_a_load_is_run_by_itself_and_its_arrays_are_counted(checkpoint):
    run = load.load_once("ours", checkpoint, "small")
    leaves = jax.tree.leaves(load_sides.ours("small")(checkpoint))
    assert run.seconds > 0 and run.held == sum(leaf.nbytes for leaf in leaves)


def test_a_side_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)status 1.*the folder holds none of"):
        load.load_once("ours", tmp_path, "small")


GROW = """
import sys, time
print("ready 0", flush=True)
sys.stdin.readline()
block = bytearray(b"x") * 200_000_000
time.sleep(0.2)
del block
print("{}", flush=True)
"""


@pytest.mark.skipif(load_sides.anonymous_bytes() is None, reason="memory is read from /proc")
def test_memory_given_back_before_the_end_is_seen():
    command = [sys.executable, "-c", GROW]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = load_sides.anonymous_bytes(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        peak = load._watch(process)
    assert 190e6 < peak - before < 230e6


def test_medians_and_ratios_are_taken_without_the_first_turn(monkeypatch):
    times = {"ours": iter([9.0, 1.0, 2.0, 1.0]), "naive": iter([9.0, 3.0, 2.0, 2.0])}
    order = []

    def once(side, folder, size):
        order.append(side)
        return load.Run(next(times[side]), 10**6, 2 * 10**6)

    monkeypatch.setattr(load, "load_once", once)
    monkeypatch.setattr(load, "available", lambda sides: dict.fromkeys(sides) | {"no": "absent"})
    made = load.measure_loads(None, "small", ["ours", "naive", "no"], rounds=3)
    assert order == ["ours", "naive", "naive", "ours"] * 2
    assert made["ours"]["seconds"] == 1.0 and made["naive"]["seconds"] == 2.0
    assert made["naive"]["ratio"] == 2.0 and made["naive"]["beyond_mb"] == 2.0
    assert made["no"] == {"skipped": "absent"}


def test_the_table_tells_what_was_not_run():
    text = load.table(found())
    assert "1.50" in text and "3.00x" in text and "not told" in text
    assert "not run: torch not installed" in text


def test_results_can_be_kept_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = measure.save("x", found(), tmp_path)
    assert json.loads(path.read_text())["ours"]["held_mb"] == 438.0
    assert len(load.figure(found()).axes) == 2
