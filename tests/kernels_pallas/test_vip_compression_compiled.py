"""Opening and closing blocks, compiled for TPUs and an H200 that are not there.

What the compilers make of the kernels is what the method's cost rests on: banks updated in place,
and no copy of one in a loop over layers, forward or backward.
"""

import functools
import importlib.util
import json
import math

import pytest

from tests.kernels_pallas import vip_compression_programs as programs
from tests.train import runs
from train.aot import topology

pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, not a TPU: pip install 'jax[tpu]'",
)


needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs the CUDA compiler, not a GPU: pip install 'jax[cuda13]'",
)


@functools.lru_cache
def compiled(target: str, backend: str, *cases: str) -> dict:
    environment = topology.environment(topology.parse(target))
    module = "tests.kernels_pallas.vip_compression_programs"
    done = runs.python("-m", module, target, backend, *cases, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def bytes_of(shape, dtype):
    return math.prod(shape) * (2 if dtype == "bfloat16" else 4)


def each_kernel(target, backend):
    """(shape, bytes of a bank, bytes of both banks, name of kernel, what was compiled)."""
    for shape, found in compiled(target, backend, "kernels")["kernels"]:
        batch, blocks, size, d, _, coarse, difference = shape
        bank = bytes_of((batch, blocks, size, d), difference)
        both = bank + bytes_of((batch, blocks, d), coarse)
        for name, program in found.items():
            yield shape, bank, both, name, program


IN_PLACE = ("write_back", "refine_back", "write_back_back")


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e:1x1", "v5p:1x1x1"])
def test_every_kernel_compiles_and_updates_the_banks_in_place(target):
    for shape, bank, both, name, program in each_kernel(target, "tpu"):
        assert program["custom_calls"] == 1, (shape, name)
        assert program["temporaries"] < bank / 20, (shape, name)
        if name in IN_PLACE:
            assert program["aliased"] == both, (shape, name)
            assert program["bank_sized"] == [], (shape, name)
        if target == "v5e:1x1" and shape[5] == "float32":
            assert program["temporaries"] == 0, (shape, name)


@needs_libtpu
@pytest.mark.parametrize("target", ["v5e:1x1", "v5p:1x1x1"])
def test_a_loop_over_layers_copies_no_bank(target):
    found = compiled(target, "tpu", "forward", "backward")
    batch, blocks, size, d, _ = programs.LOOP
    banks = bytes_of((batch, blocks, size + 1, d), "float32")
    assert found["forward"]["bank_sized"] == []
    assert found["backward"]["bank_sized"] == []
    assert found["forward"]["aliased"] == banks
    assert found["backward"]["aliased"] == 2 * banks  # the states and their cotangents


@needs_libtpu
def test_a_bank_that_is_not_pinned_is_carried_onto_the_chip_and_back_in_every_layer():
    """Why the kernels pin it; and what the test above looks for exists, and is found."""
    found = compiled("v5e:1x1", "tpu", "unpinned")["unpinned"]["bank_sized"]
    moves = [line for line in found if " copy-start(" in line or " slice-start(" in line]
    assert len(moves) >= 2, found  # there, whole or an example at a time, and back


@needs_cuda_compiler
def test_every_kernel_compiles_for_an_h200_and_updates_the_banks_in_place():
    for shape, _, both, name, program in each_kernel("h200", "gpu"):
        if name in IN_PLACE:
            assert program["custom_calls"] == 1, (shape, name)
            assert program["aliased"] == both, (shape, name)
            assert program["temporaries"] < 1024, (shape, name)
            assert program["bank_sized"] == [], (shape, name)


@needs_cuda_compiler
@pytest.mark.parametrize("backend", ["gpu", "xla"])
def test_a_loop_over_layers_copies_no_bank_on_an_h200(backend):
    found = compiled("h200", backend, "forward", "backward")
    for case in ("forward", "backward"):
        copies = [line for line in found[case]["bank_sized"] if " copy(" in line]
        assert copies == []
