"""Weighted attention compiled for TPUs and an H200 that are not there, and split over devices."""

import functools
import importlib.util
import json

import pytest

from tests.kernels_pallas.weighted_attention_programs import CASES
from tests.train import runs
from train.aot import topology

pytestmark = pytest.mark.slow


@functools.lru_cache
def found(target: str, *cases: str) -> dict:
    environment = topology.environment(topology.parse(target))
    module = "tests.kernels_pallas.weighted_attention_programs"
    done = runs.python("-m", module, target, *cases, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def needs(module: str, extra: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs a compiler: pip install 'jax[{extra}]'")


@needs("libtpu", "tpu")
@pytest.mark.parametrize(
    ("target", "case"),
    [("v5e:1x1", "t5_base_4k"), ("v5e:1x1", "roberta_large_4k"), ("v5p:1x1x1", "t5_base_4k")],
)
def test_tpu_kernels_compile_without_scores_in_memory(target, case):
    """Forward and backward are three kernels; the rest is the inputs laid out anew."""
    made = found(target, case)[case]
    assert made["kernels"] == 3
    assert made["temporaries"] < 0.7 * made["scores"]


@needs("jax_cuda13_plugin", "cuda13")
@pytest.mark.parametrize("case", CASES)
def test_an_h200_gets_fused_attention_or_chunks(case):
    """cuDNN forward and backward where the bias fits into features; chunks of scores elsewhere."""
    made = found("h200", case)[case]
    *_, dtype, with_relative = CASES[case]
    fused = dtype == "bfloat16" and not with_relative
    assert made["cudnn"] == (2 if fused else 0)
    if fused or case == "t5_base_128k":
        assert made["temporaries"] < 0.3 * made["scores"]


def test_devices_that_share_a_batch_agree_with_one():
    for name, difference in found("cpu:2", "split")["split"].items():
        assert difference < 1e-4, name
