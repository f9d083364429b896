"""Run by test_vip_compression_compiled.py: the kernels, compiled for hardware that is not there.

python -m tests.kernels_pallas.vip_compression_programs v5e:1x1 BACKEND CASE...

A case is `kernels` (every kernel at the shapes below) or a loop over layers: `forward`, `backward`,
or `unpinned`, forward with banks that the compiler may place where it likes. Prints what the
compiler made of them as JSON: bytes of temporaries and of aliased arguments, custom calls, and the
instructions that make an array as large as a bank other than in place.
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas import vip_compression as vip
from kernels_pallas.vip_compression import tpu_visit
from train.aot import topology

# (B, m, b, d, k, dtype of C, dtype of D)
SHAPES = {
    "v5e": [
        (1, 1000, 16, 768, 90, "float32", "float32"),
        (2, 128, 8, 1024, 37, "float32", "bfloat16"),
        (1, 96, 32, 768, 20, "bfloat16", "bfloat16"),
        (1, 96, 64, 768, 96, "float32", "float32"),
        (2, 40, 128, 1024, 7, "bfloat16", "float32"),
    ],
    "v5p": [
        (1, 1000, 16, 768, 90, "float32", "float32"),
        (2, 40, 128, 1024, 7, "bfloat16", "bfloat16"),
    ],
    "h200": [
        (1, 1000, 16, 768, 90, "float32", "float32"),
        (2, 128, 8, 1024, 37, "float32", "bfloat16"),
        (2, 40, 128, 1024, 7, "bfloat16", "bfloat16"),
    ],
}
LOOP = (2, 120, 16, 768, 20)  # B, m, b, d, k: banks of 11.8 MB, which would fit on the chip
NO_COPIES = ("tuple", "get-tuple-element", "parameter", "while", "bitcast", "conditional", "call")


def bank_sized(text: str, elements: int) -> list[str]:
    """Instructions that make an array of at least so many elements, where not in place in HBM.

    A custom call with `output_to_operand_aliasing` writes into what it was given.
    """
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([\w-]+)\(", line)
        if match is None or match[2] in NO_COPIES:
            continue
        for shape, layout in re.findall(r"\w+\[([\d,]+)\]\{([^}]*)\}", match[1]):
            if np.prod([int(n) for n in shape.split(",")]) < elements:
                continue
            if match[2] == "custom-call" and "aliasing" in line and "S(" not in layout:
                continue
            found.append(line.strip()[:200])
            break
    return found


def compiled(
    function: Callable[..., Any], shapes: list[Any], donated: tuple[int, ...], elements: int
) -> dict[str, Any]:
    """What the compiler made of a function of arrays."""
    program = jax.jit(function, donate_argnums=donated).lower(*shapes).compile()
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "custom_calls": len(re.findall(r'custom_call_target="(?:tpu_custom|mosaic_gpu)', text)),
        "bank_sized": bank_sized(text, elements),
    }


def kernels(shape: tuple[Any, ...], backend: str, make: Callable[..., Any]) -> dict[str, Any]:
    """Forward and backward of the operations at one shape; the banks are donated."""
    batch, blocks, size, d, k, coarse, difference = shape
    banks = [make(batch, blocks, d, dtype=coarse), make(batch, blocks, size, d, dtype=difference)]
    index, mask = make(batch, k, dtype="int32"), make(batch, k, size)
    fine = make(batch, k, size, d, dtype=jnp.promote_types(coarse, difference))
    every = make(batch, blocks, size)
    on = dict(backend=backend)

    def refine_back(coarse: Any, difference: Any, index: Any, fine: Any) -> Any:
        _, pull = jax.vjp(lambda c, d: vip.open_blocks(c, d, index, **on), coarse, difference)
        return pull((fine, coarse, difference))

    def write_back_back(coarse: Any, difference: Any, index: Any, mask: Any) -> Any:
        zeros = jnp.zeros(fine.shape, fine.dtype)
        write = functools.partial(vip.write_back, **on)
        _, pull = jax.vjp(lambda c, d, f: write(c, d, index, f, mask), coarse, difference, zeros)
        return pull((coarse, difference))

    def enter_back(coarse: Any, difference: Any, mask: Any) -> Any:
        zeros = jnp.zeros(difference.shape, coarse.dtype)
        _, pull = jax.vjp(lambda x: vip.enter(x, mask, **on), zeros)
        return pull((coarse, difference.astype(coarse.dtype)))

    def leave_back(coarse: Any, difference: Any, mask: Any) -> Any:
        _, pull = jax.vjp(lambda c, d: vip.leave(c, d, mask, **on), coarse, difference)
        return pull(difference.astype(jnp.promote_types(coarse.dtype, difference.dtype)))

    cases = {
        "refine": (functools.partial(vip.refine, **on), [*banks, index], ()),
        "write_back": (
            functools.partial(vip.write_back, **on),
            [*banks, index, fine, mask],
            (0, 1),
        ),
        "refine_back": (refine_back, [*banks, index, fine], (0, 1)),
        "write_back_back": (write_back_back, [*banks, index, mask], (0, 1)),
        "enter": (functools.partial(vip.enter, **on), [banks[1], every], ()),
        "leave": (functools.partial(vip.leave, **on), [*banks, every], ()),
        "enter_back": (enter_back, [*banks, every], ()),
        "leave_back": (leave_back, [*banks, every], ()),
    }
    elements = batch * blocks * size * d
    return {name: compiled(*case, elements) for name, case in cases.items()}


def layers(backend: str, k: int, weights: Any, coarse: Any, difference: Any) -> tuple[Any, Any]:
    """A loop over layers that opens blocks, changes all rows and closes the blocks."""

    def layer(banks: tuple[Any, Any], weight: Any) -> tuple[Any, None]:
        coarse, difference = banks
        scores = jax.lax.stop_gradient(coarse @ weight[0])
        index = jax.lax.top_k(scores, k)[1]
        fine, coarse, difference = vip.open_blocks(coarse, difference, index, backend=backend)
        batch, _, size, d = fine.shape
        rows = jnp.concatenate([fine.reshape(batch, k * size, d), coarse], axis=1)
        rows = rows + jnp.tanh(rows @ weight)
        fine, coarse = rows[:, : k * size].reshape(fine.shape), rows[:, k * size :]
        mask = jnp.ones(fine.shape[:3])
        return vip.write_back(coarse, difference, index, fine, mask, backend=backend), None

    return jax.lax.scan(layer, (coarse, difference), weights)[0]


def loop(case: str, backend: str, make: Callable[..., Any]) -> dict[str, Any]:
    """The loop forward alone, or forward and backward; the states and cotangents are donated."""
    batch, blocks, size, d, k = LOOP
    run = functools.partial(layers, backend, k)

    def backward(weights: Any, coarse: Any, difference: Any, *bars: Any) -> Any:
        banks, pull = jax.vjp(run, weights, coarse, difference)
        return banks, pull(bars)

    states = [make(batch, blocks, d), make(batch, blocks, size, d)]
    weights, elements = make(3, d, d), batch * blocks * size * d
    if case == "unpinned":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpu_visit, "is_bank", lambda operand: False)
            return compiled(run, [weights, *states], (1, 2), elements)
    if case == "forward":
        return compiled(run, [weights, *states], (1, 2), elements)
    return compiled(backward, [weights, *states, *states], (1, 2, 3, 4), elements)


def main(target: str, backend: str, cases: list[str]) -> None:
    """Compiles the cases and prints what was found."""
    mesh = topology.mesh_for(topology.parse(target))

    def make(*shape: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    found: dict[str, Any] = {}
    for case in cases:
        if case == "kernels":
            shapes = SHAPES[target.partition(":")[0]]
            found[case] = [[shape, kernels(shape, backend, make)] for shape in shapes]
        else:
            found[case] = loop(case, backend, make)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
