"""Run by test_layers_compiled.py: stacks of VCC layers, compiled for TPUs that are not there.

python -m tests.vcc.layer_programs v5e:1x1 CASE...

`inference` and `training` run three narrow RoBERTa layers as `VccEncoder` does, states and
cotangents donated; `..._twice` the same rows on blocks of twice the tokens. `long` trains eight
layers of T5-base's width on 128K tokens in bfloat16. Prints as JSON what the compiler made of them.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.core import blocks, partitioning
from jaxmodels.trunks import bert, t5
from jaxmodels.vcc import VccConfig, compression
from jaxmodels.vcc.layer import RelativePositions, VccLayer, run_vcc_layers
from train.aot import topology

NARROW = bert.BertConfig(
    d_model=256, d_ff=512, num_heads=4, num_layers=3, norm_order="pre", dropout_rate=0.0,
    attention_dropout_rate=0.0, remat="full",
)  # fmt: skip
BASE = dataclasses.replace(
    t5.SIZES["t5_base"], num_layers=8, dropout_rate=0.0, remat="full", dtype=jnp.bfloat16
)
# Trunk, m, p, b, k. Both narrow ones run on 8 + 128 + 120 = 256 rows.
CASES = {
    "inference": (NARROW, 120, 8, 16, 8),
    "training": (NARROW, 120, 8, 16, 8),
    "training_twice": (NARROW, 120, 8, 32, 4),
    "long": (BASE, 1024, 48, 128, 20),
}
FREE = ("tuple", "get-tuple-element", "parameter", "while", "bitcast", "conditional", "call")


class Stack:
    """The VCC layers of a case: the function, and shapes of what it takes."""

    def __init__(self, case: str, kernels: str = "pallas"):
        trunk, blocks_, p, b, k = CASES[case]
        self.trunk = trunk
        self.bias = trunk.make_bias() if isinstance(trunk, t5.T5Config) else None
        vcc = VccConfig(
            ("vcc",) * trunk.num_layers,
            num_vip=p,
            block_size=b,
            num_fine_blocks=k,
            kernels=kernels,
        )
        self.layer = trunk.make_layer(cls=VccLayer, vcc=vcc)
        self.bank = (1, blocks_, b, trunk.d_model)

    def shapes(self, place: Callable[..., Any]) -> tuple[Any, ...]:
        """Parameters, position table, state and layout; `place` gives a shape its device."""
        (batch, m, b, d), p = self.bank, self.layer.vcc.num_vip
        init = blocks.stacked_init(self.trunk.make_layer(), self.trunk.num_layers, d)
        trees = [jax.eval_shape(init, jax.random.key(0)), {}]
        if self.bias is not None:
            rows = jax.ShapeDtypeStruct((self.bias.num_buckets, self.bias.num_heads), jnp.float32)
            trees[1] = {"embedding": rows}
        params, table = (jax.tree.map(place, partitioning.unbox(tree)) for tree in trees)

        def make(*shape: int, dtype: Any = jnp.float32) -> Any:
            return place(jax.ShapeDtypeStruct((batch, *shape), dtype))

        integers = (make(*shape, dtype=jnp.int32) for shape in ((p + m * b,), (p,), (m, b), (m,)))
        order, *positions = integers
        state = compression.State(make(p, d), make(m, d), make(m, b, d))
        places = compression.Positions(*positions) if table else None
        layout = compression.Layout(order, make(p), make(p), make(m, b), places)
        return params, table, state, layout

    def forward(self, params: Any, table: Any, state: Any, layout: Any) -> Any:
        """The state after all layers."""
        relative = RelativePositions(table, self.bias) if table else None
        return run_vcc_layers(
            *(self.layer, params, state, layout, None, self.trunk.remat, relative)
        )[0]

    def training(self, params: Any, table: Any, state: Any, layout: Any, bar: Any) -> Any:
        """The state after all layers, and gradients of all that is learned and of the state."""
        after, pull = jax.vjp(lambda *x: self.forward(*x, layout), params, table, state)
        return after, pull(bar)


def in_loops(text: str) -> list[str]:
    """The instructions in bodies of loops of a compiled program."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, inside = [], False
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = line.lstrip("%").split(" ")[0] in bodies
        elif inside:
            found.append(line)
    return found


def makes_bank(line: str, elements: int) -> bool:
    """Whether an instruction makes an array of the size of a bank, other than in place in HBM."""
    match = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([\w-]+)\(", line)
    if match is None or match[2] in FREE:
        return False
    for shape, layout in re.findall(r"\w+\[([\d,]+)\]\{([^}]*)\}", match[1]):
        in_place = match[2] == "custom-call" and "aliasing" in line and "S(" not in layout
        if np.prod([int(n) for n in shape.split(",")]) == elements and not in_place:
            return True
    return False


def run(case: str, mesh: Any) -> dict[str, Any]:
    """Compiles a case and tells what was made of it."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    stack = Stack(case)
    function, donated = (stack.forward, (2,)) if case == "inference" else (stack.training, (2, 4))
    shapes = stack.shapes(place)
    if case != "inference":
        shapes = (*shapes, shapes[2])
    with jax.set_mesh(mesh):
        program = jax.jit(function, donate_argnums=donated).lower(*shapes).compile()
    memory, text = program.memory_analysis(), program.as_text()
    lines = in_loops(text)
    return {
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "bytes": program.cost_analysis()["bytes accessed"],
        "loops": len(re.findall(r"body=", text)),
        "kernels": sum('custom_call_target="tpu_custom_call"' in line for line in lines),
        "moved": [line.strip()[:200] for line in lines if makes_bank(line, np.prod(stack.bank))],
    }


def main(target: str, cases: list[str]) -> None:
    """Compiles the cases and prints what was found."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)  # quicker to compile
    mesh = topology.mesh_for(topology.parse(target))
    print("\n" + json.dumps({case: run(case, mesh) for case in cases}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
