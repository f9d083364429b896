"""Run by test_aot.py: what the layer's exchanges become on two TPU slices that are not there."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.core import partitioning
from jaxmodels.smile import Grid, MoeConfig, grid, moe

TOKENS, D, F = 64, 256, 256  # few tokens compile faster
_EXCHANGE = re.compile(r"= \(?(\w+)\[([\d,]*)\].* (all-to-all|ragged-all-to-all)(?:-start)?\(")
_SEND = re.compile(r"= \((\w+)\[([\d,]*)\].* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")


def elements(text: str) -> int:
    size = 1
    for part in filter(None, text.split(",")):
        size *= int(part)
    return size


def compiled(mesh: Any, config: MoeConfig) -> str:
    """The forward layer's compiled text."""

    def shape(sizes: tuple[int, ...], spec: PartitionSpec, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    e, every = config.num_experts, PartitionSpec(partitioning.AXES)
    params: dict[str, Any] = {
        name: shape(sizes, PartitionSpec()) for name, sizes in config.router_shapes(D).items()
    }
    params["experts"] = {"wi": shape((e, D, F), every), "wo": shape((e, F, D), every)}
    lead = (config.grid.nodes, config.grid.devices, TOKENS, D)
    x = shape(lead, PartitionSpec(*partitioning.AXES), jnp.bfloat16)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda p, x: moe.apply(p, x, config, deterministic=False)[0])
        return run.lower(params, x).compile().as_text()


def main() -> None:
    devices = get_topology_desc(platform="tpu", topology_name="v6e:2x2", num_slices=2).devices
    mesh = partitioning.make_mesh(devices=devices)
    grid.check_nodes(mesh)
    found: dict[str, Any] = {"mesh": dict(mesh.shape)}
    for name, changes in (
        ("flat", {"routing": "one_level", "transport": "flat"}),
        ("two_hop", {"routing": "one_level", "transport": "two_hop"}),
        ("mosaic", {"dispatch": "mosaic"}),
        # With room for the worst case: without it the safe path is compiled beside the fast one.
        ("ragged", {"transport": "ragged", "buffer_factor": 8.0}),
    ):
        config = MoeConfig(
            num_experts=8,
            d_ff=F,
            grid=Grid(2, 4),
            capacity_factor=1.0,
            use_bias=False,
            dtype=jnp.bfloat16,
            **changes,
        )
        text = compiled(mesh, config)
        lines = text.splitlines()
        inside = [m for m in map(_EXCHANGE.search, lines) if m]
        across = [m for m in map(_SEND.search, lines) if m]
        found[name] = {
            "inside": [elements(m.group(2)) for m in inside],
            "across": [[m.group(3), elements(m.group(2))] for m in across],
            "kernels": text.count('custom_call_target="tpu_custom_call"'),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
