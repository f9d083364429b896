"""Compiled for two TPU slices without a TPU: which exchange crosses which network."""

import importlib.util
import json

import pytest

from tests.smile import aot_script
from tests.train import runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler"),
]
BUFFER = aot_script.TOKENS * aot_script.D  # elements of a device's buffer at capacity factor 1


def large(sizes) -> int:
    return sum(size >= BUFFER // 2 for size in sizes)


def test_only_the_exchange_between_nodes_leaves_a_slice() -> None:
    done = runs.python(
        "-m",
        "tests.smile.aot_script",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5litepod-1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mesh"] == {"node": 2, "device": 4}
    for name, inside in (("flat", 0), ("two_hop", 2), ("mosaic", 2)):
        assert large(found[name]["inside"]) == inside, (name, found[name])
        assert large(size for _, size in found[name]["across"]) == 2, (name, found[name])
    assert found["mosaic"]["kernels"] == 4 and found["two_hop"]["kernels"] == 0
    assert found["ragged"]["inside"], found["ragged"]  # the real ragged exchange, not its emulation
