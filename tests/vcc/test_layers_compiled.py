"""VCC layers compiled for TPUs: the bank stays where it is, and memory is that of the rows."""

import functools
import importlib.util
import json
import math

import jax
import pytest

from jaxmodels.core import blocks
from jaxmodels.vcc.layer import RelativePositions, run_vcc_layer
from tests.train import runs
from tests.vcc import layer_programs
from train.aot import topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, not a TPU: pip install 'jax[tpu]'",
)


@functools.lru_cache
def compiled(target: str, *cases: str) -> dict:
    environment = topology.environment(topology.parse(target))
    done = runs.python("-m", "tests.vcc.layer_programs", target, *cases, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def state_bytes(case: str) -> int:
    """Of P, C and D in float32."""
    _, m, p, b, _ = layer_programs.CASES[case]
    return 4 * layer_programs.CASES[case][0].d_model * (p + m + m * b)


@needs_libtpu
@pytest.mark.slow
def test_no_layer_copies_the_bank_and_its_length_costs_nothing() -> None:
    found = compiled("v5e:1x1", "training", "training_twice")
    for case, made in found.items():
        assert made["loops"] == 2 and made["kernels"] == 8  # forward, and backward with a recompute
        assert made["moved"] == []
        assert made["aliased"] == 2 * state_bytes(case)  # the states and their cotangents
    once, twice = (found[case]["bytes"] for case in found)
    assert twice < 1.05 * once


@needs_libtpu
@pytest.mark.slow
def test_inference_compiles_with_its_state_in_place() -> None:
    """The compiler crashed on this very program where selection was fused into one piece."""
    made = compiled("v5p:1x1x1", "inference")["inference"]
    assert made["moved"] == [] and made["kernels"] == 3
    assert made["aliased"] == state_bytes("inference")


def kept_by_whole_layer_remat() -> int:
    """Bytes that the backward pass of the long case keeps where whole layers are recomputed."""
    stack = layer_programs.Stack("long", kernels="xla")
    params, table, state, layout = stack.shapes(lambda leaf: leaf)

    def pull(params, table, state, layout):
        def body(one, state, key):
            relative = RelativePositions(table, stack.bias)
            return run_vcc_layer(stack.layer, one, state, layout, key, "none", relative)[0], None

        def forward(params, table, state):
            return blocks.scan_layers(body, params, state, None, "full")[0]

        return jax.vjp(forward, params, table, state)[1]

    kept = jax.eval_shape(pull, params, table, state, layout)
    own = jax.tree.leaves((params, table, layout))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return size - sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in own)


@needs_libtpu
@pytest.mark.slow
def test_training_at_128k_tokens_fits_where_whole_layer_remat_keeps_a_bank_a_layer() -> None:
    made = compiled("v5e:1x1", "long")["long"]
    kept = kept_by_whole_layer_remat()
    assert kept > 8 * state_bytes("long") - 2**20
    assert made["temporaries"] < 0.8 * kept
    assert made["temporaries"] < 2.5e9
    assert made["moved"] == [] and made["aliased"] == 2 * state_bytes("long")


def test_a_copy_of_the_bank_in_a_loop_would_be_found() -> None:
    text = """
%body.1 (a: f32[1,6,8,128]) -> f32[1,6,8,128] {
  %a = f32[1,6,8,128]{3,2,1,0:T(8,128)} parameter(0)
  %copy.1 = f32[1,6,8,128]{3,2,1,0:T(8,128)} copy(%a)
  %near = (f32[48,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%a)
  %kernel = f32[1,6,8,128]{3,2,1,0} custom-call(%a), output_to_operand_aliasing={{}: (0, {})}
  ROOT %out = f32[1,6,8,64]{3,2,1,0} add(%copy.1, %copy.1)
}
ENTRY %main (a: f32[1,6,8,128]) -> f32[1,6,8,128] {
  %outside = f32[1,6,8,128]{3,2,1,0:T(8,128)} copy(%a)
  ROOT %while.1 = f32[1,6,8,128]{3,2,1,0} while(%outside), condition=%c, body=%body.1
}
"""
    lines = layer_programs.in_loops(text)
    found = [line for line in lines if layer_programs.makes_bank(line, 6 * 8 * 128)]
    assert [line.split()[0] for line in found] == ["%copy.1", "%near"]
