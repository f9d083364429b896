"""Run by test_mesh.py with eight simulated devices: meshes and transports."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core import partitioning
from jaxmodels.smile import Grid
from tests.smile import small

MESHES = ((2, 4), (4, 2), (8, 1), (1, 8))


def arrays(found: Any) -> list[np.ndarray]:
    return [np.asarray(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(found)]


def on(mesh: tuple[int, int], config: Any) -> list[np.ndarray]:
    """Output, report and gradients of the layer on a mesh."""
    params, x = small.params(config), small.tokens(config).astype(config.dtype)
    with jax.set_mesh(partitioning.make_mesh(*mesh, jax.devices()[: mesh[0] * mesh[1]])):
        return arrays(small.gradients(params, x, config))


def differences(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Largest difference, relative to the largest value of its array where that exceeds 1."""
    pairs = zip(a, b, strict=True)
    return max(float(np.abs(u - v).max() / max(1.0, np.abs(v).max())) for u, v in pairs)


def transports() -> dict[str, float]:
    """Largest difference between flat and two-hop exchange, by mesh and type."""
    found = {}
    for mesh, dtype in (*((mesh, jnp.float32) for mesh in MESHES), (MESHES[0], jnp.bfloat16)):
        made = [
            on(
                mesh,
                small.config(
                    routing="one_level",
                    transport=transport,
                    grid=Grid(*mesh),
                    num_experts=8,
                    capacity_factor=1.0,
                    dtype=dtype,
                ),
            )
            for transport in ("flat", "two_hop")
        ]
        found[f"{mesh[0]}x{mesh[1]} {jnp.dtype(dtype).name}"] = differences(*made)
    return found


def meshes() -> dict[str, float]:
    """Largest difference of a 2 x 4 grid on a mesh from the same grid on one device."""
    found = {}
    for name, changes in (
        ("bi_level", {}),
        ("ragged", {"transport": "ragged", "buffer_factor": 8.0}),
    ):
        config = small.config(grid=Grid(2, 4), num_experts=8, capacity_factor=1.0, **changes)
        alone = on((1, 1), config)
        for mesh in ((2, 4), (1, 2), (2, 1)) if not changes else ((2, 4),):
            found[f"{name} {mesh[0]}x{mesh[1]}"] = differences(on(mesh, config), alone)
    return found


if __name__ == "__main__":
    print(json.dumps({"transports": transports(), "meshes": meshes()}))
