"""The kernels equal the reference in interpret mode, with their gradients, and compile for TPUs."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import expert_dispatch
from kernels_pallas.expert_dispatch import reference, tpu

ROOT = pathlib.Path(__file__).parents[2]
TYPES = (jnp.float32, jnp.bfloat16)


def case(dtype, rows: int = 70, out: int = 150, d: int = 256, seed: int = 0):
    """Rows, an index without repetitions but with holes and values outside, gates (one NaN)."""
    rng = np.random.default_rng(seed)
    index = np.full(out, -1)
    places = rng.choice(out, min(out, rows) * 3 // 4, replace=False)
    index[places] = rng.permutation(rows)[: len(places)]
    index[np.flatnonzero(index < 0)[:3]] = rows + 5
    gate = rng.random(out).astype(np.float32)
    gate[np.flatnonzero(index < 0)[:1]] = np.nan
    index = jnp.asarray(index, jnp.int32)
    x = jnp.asarray(rng.normal(size=(rows, d)), dtype)
    return x, index, jnp.asarray(gate), expert_dispatch.inverse(index, rows)


def test_inverse_finds_every_place_and_nothing_else() -> None:
    index = jnp.asarray([3, -1, 0, 9, 2], jnp.int32)
    np.testing.assert_array_equal(expert_dispatch.inverse(index, 5), [2, -1, 4, 0, -1])


def test_the_reference_is_the_loop() -> None:
    x, index, gate, _ = case(jnp.float32)
    wanted = np.zeros((len(index), x.shape[1]), np.float32)
    for place, row in enumerate(np.asarray(index)):
        if 0 <= row < len(x):
            wanted[place] = np.asarray(gate)[place] * np.asarray(x)[row]
    np.testing.assert_array_equal(reference.combine(x, index, gate), wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(70, 150, 256), (3, 1, 512), (5, 256, 256)], ids=str)
def test_kernels_equal_the_reference_bit_for_bit(dtype, sizes) -> None:
    x, index, gate, _ = case(dtype, *sizes)
    taken = tpu.take_rows(x, index, interpret=True)
    np.testing.assert_array_equal(taken, reference.take_rows(x, index))
    made = tpu.combine(x, index, gate, interpret=True)
    np.testing.assert_array_equal(made, reference.combine(x, index, gate))
    nothing = jnp.full_like(index, -1)
    assert not tpu.combine(x, nothing, gate, interpret=True).any()


def plain(x, index, gate):
    """Autodiff's own way: a gather, whose transpose is a scatter."""
    inside = (index >= 0) & (index < x.shape[0])
    gate = jnp.where(inside, gate, 0)
    taken = x[jnp.where(inside, index, 0)].astype(jnp.float32)
    return jnp.where(inside[:, None], gate[:, None] * taken, 0)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_interpret"])
def test_gradients_are_those_of_autodiff(implementation: str) -> None:
    x, index, gate, back = case(jnp.float32)
    dy = jnp.asarray(np.random.default_rng(9).normal(size=(len(index), x.shape[1])), jnp.float32)

    def objective(x, gate):
        return (expert_dispatch.combine(x, index, gate, back, implementation) * dy).sum()

    found = jax.jit(jax.grad(objective, (0, 1)))(x, gate)
    wanted = jax.jit(jax.grad(lambda x, gate: (plain(x, index, gate) * dy).sum(), (0, 1)))(x, gate)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    taken = functools.partial(expert_dispatch.take_rows, implementation=implementation)
    dx = jax.jit(jax.grad(lambda x: (taken(x, index, back) * dy).sum()))(x)
    np.testing.assert_allclose(dx, reference.take_rows(dy, back), rtol=1e-6)


def test_the_gradient_scatters_no_rows() -> None:
    x, index, gate, back = case(jnp.float32)
    grad = jax.grad(lambda x: (expert_dispatch.combine(x, index, gate, back, "xla") ** 2).sum())
    assert "scatter" not in jax.jit(grad).lower(x).as_text()


def test_rows_that_a_kernel_does_not_take_are_refused_by_name() -> None:
    x, index, _, back = case(jnp.float32, d=100)
    with pytest.raises(ValueError, match="100 float32.*multiple of 128"):
        expert_dispatch.take_rows(x, index, back, "mosaic")
    with pytest.raises(ValueError, match="use one of"):
        expert_dispatch.take_rows(x, index, back, "triton")
    np.testing.assert_array_equal(  # left to choose, the api takes what works
        expert_dispatch.take_rows(x, index, back), reference.take_rows(x, index)
    )


COMPILE = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernels_pallas import expert_dispatch
for name in sys.argv[1:]:
    devices = get_topology_desc(platform="tpu", topology_name=name).devices
    one = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())
    def shape(sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=one)
    for dtype in (jnp.float32, jnp.bfloat16):
        def objective(x, index, gate, back):
            return expert_dispatch.combine(x, index, gate, back).astype(jnp.float32).sum()
        arguments = (shape((512, 256), dtype), shape((600,), jnp.int32),
                     shape((600,), jnp.float32), shape((512,), jnp.int32))
        text = jax.jit(jax.value_and_grad(objective, (0, 2))).lower(*arguments).compile().as_text()
        print(name, jnp.dtype(dtype).name, text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_kernels_compile_for_tpus_forward_and_backward() -> None:
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "v5e:2x2", "v5p:2x2x1", "v6e:2x2"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 6
    assert all(int(line[2]) == 3 for line in lines), done.stdout  # combine, its dx, rows for dgate
