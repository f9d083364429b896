"""Compiles weighted attention for hardware that is not there, and prints what the compiler made.

A process of its own: python -m tests.kernels_pallas.weighted_attention_programs TARGET CASE...
with the environment of `train.aot.topology.environment`. Case "split" runs on simulated devices.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kernels_pallas.weighted_attention import RelativeBias, weighted_attention
from train.aot import topology

# r, h, dh, dtype, relative bias: the published presets of RoBERTa and T5, 4K to 128K tokens.
CASES = {
    "roberta_base_4k": (1216, 12, 64, "bfloat16", False),
    "roberta_large_4k": (1306, 16, 64, "bfloat16", False),
    "roberta_base_4k_float32": (1216, 12, 64, "float32", False),
    "t5_base_4k": (1396, 12, 64, "bfloat16", True),
    "t5_base_16k_float32": (2419, 12, 64, "float32", True),
    "t5_3b_4k": (1816, 32, 128, "bfloat16", True),
    "t5_base_128k": (9587, 12, 64, "bfloat16", True),
}


def compile_case(case: str, mesh: Any) -> dict[str, Any]:
    """Forward and backward of one example."""
    length, heads, width, dtype, with_relative = CASES[case]
    sharding = NamedSharding(mesh, PartitionSpec())

    def make(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    states = make(1, length, heads, width, dtype=dtype)
    relative = None
    if with_relative:
        relative = RelativeBias(make(1, length, dtype=jnp.int32), make(32, heads))

    def run(inputs: Any, g: jax.Array) -> Any:
        out, pull = jax.vjp(weighted_attention, *inputs)
        return out, pull(g)

    inputs = (states, states, states, make(1, length), relative)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(inputs, states).compile()
    text = compiled.as_text()
    return {
        "scores": 4 * heads * length**2,  # bytes of one float32 array of them
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "cudnn": text.count('custom_call_target="__cudnn$fmha'),
    }


def split(mesh: Any) -> dict[str, float]:
    """Largest difference between one device and several that share the batch, by output."""
    rng = np.random.default_rng(0)
    query, key, value, g = (
        jnp.asarray(rng.normal(size=(4, 40, 2, 64)), jnp.float32) for _ in "qkvg"
    )
    bias = jnp.asarray(rng.normal(size=(4, 40)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 300, (4, 40)), jnp.int32)
    table = jnp.asarray(rng.normal(size=(32, 2)), jnp.float32)

    def gradients(**options: Any) -> Any:
        def run(*inputs: Any) -> Any:
            *inputs, table = inputs
            relative = RelativeBias(positions, table)
            out = weighted_attention(*inputs, relative, implementation="chunked", **options)
            return jnp.vdot(out, g), out

        grads, out = jax.jit(jax.grad(run, argnums=range(5), has_aux=True))(
            query, key, value, bias, table
        )
        return dict(zip(["query", "key", "value", "bias", "table"], grads, strict=True), out=out)

    wanted = gradients()
    with jax.set_mesh(mesh):
        found = gradients(batch_axes=("node", "device"))
    assert len(found["query"].sharding.device_set) > 1
    return {
        name: float(np.abs(np.asarray(found[name]) - np.asarray(x)).max())
        for name, x in wanted.items()
    }


def main(target: str, cases: list[str]) -> None:
    """Compiles the cases and prints what was found."""
    mesh = topology.mesh_for(topology.parse(target))
    found = {case: split(mesh) if case == "split" else compile_case(case, mesh) for case in cases}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
