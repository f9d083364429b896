"""Run by test_kernels.py with two simulated devices: VCC layers by the kernels on a mesh."""

import sys

import jax
import numpy as np

from jaxmodels.core import partitioning
from tests.vcc import small, test_kernels

if __name__ == "__main__":
    mesh = partitioning.make_mesh(2, 1, jax.devices())
    config = test_kernels.ROBERTA
    given = small.states(2, 40, 37, width=128)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(partitioning.AXES))
    split = [jax.device_put(array, rows) for array in given]
    with jax.set_mesh(mesh):
        params = test_kernels.parameters(config)
        found = test_kernels.gradients(config, "interpret", params, split)
    assert found[0][1][0].sharding.is_equivalent_to(rows, 3), found[0][1][0].sharding
    np.savez(sys.argv[1], *map(np.asarray, jax.tree.leaves(found)))
