"""T5 and the sparse baselines in the benchmark of length, on the TPU's compiler, beside PyTorch."""

import dataclasses
import json
import pathlib

import jax
import pytest

from benchmarks import vcc_programs, vcc_vs_torch
from tests.train import runs
from train.flops import count_flops


@pytest.mark.parametrize("side", ["vcc", "longt5", "window"])
def test_the_formula_is_what_the_program_of_t5_does(side: str) -> None:
    trunk, vcc = vcc_programs.sizes("t5_base_narrative_qa", 4096)
    trunk = dataclasses.replace(trunk, num_layers=6)
    vcc = dataclasses.replace(vcc, kinds=vcc.kinds[2:8])
    program = vcc_programs.make_program("encoder", side, trunk, vcc, 4096)
    counted = count_flops(jax.make_jaxpr(program.forward)(*program.shapes))
    assert counted == pytest.approx(program.formula, rel=0.02)


def test_published_sizes_reach_128k() -> None:
    _, vcc = vcc_programs.sizes("t5_base_narrative_qa", 131_072)
    assert (vcc.num_vip, vcc.block_size, vcc.num_fine_blocks) == (48, 16, 90)
    assert vcc.compressed_length(131_072) == 9587


def test_one_layer_of_t5_is_refused() -> None:
    sizes = vcc_programs.sizes("t5_base_narrative_qa", 64)
    with pytest.raises(ValueError, match="of T5, choose the encoder"):
        vcc_programs.make_program("layer", "vcc", *sizes, 64)


@pytest.mark.slow
def test_vcc_ours_and_pytorch_are_timed_on_the_same_weights() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    rows = vcc_vs_torch.compare_lengths([96], preset="t5_quickstart", budget_s=120.0, rounds=2)
    assert [row["side"] for row in rows] == ["vcc", "dense", "torch"]
    assert all(row["ms"] > 0 and row["reason"] is None for row in rows)
    assert "dense, PyTorch" in vcc_vs_torch.table(rows)


@pytest.mark.slow
def test_the_tpus_compiler_tells_memory_and_bytes_of_each_side(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("libtpu")
    sizes = ["--preset=t5_quickstart", "--lengths=256", f"--out={tmp_path}"]
    done = runs.python("-m", "benchmarks.vcc_length_tpu", *sizes, "--sides=vcc,window")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local + VCC" in done.stdout
    rows = json.loads((tmp_path / "vcc_length_tpu.json").read_text())["rows"]
    assert [row["reason"] for row in rows] == [None, None]
    assert all(row[name] > 0 for row in rows for name in ("gflop", "peak_mib", "moved_mib"))
