"""Run by test_checkpoint_mesh.py with eight simulated devices: one checkpoint on every mesh."""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.train import checkpoint_cases as cases
from train.checkpoint import Checkpoints
from train.state import TrainState

# Shape of the mesh and its devices: others, in another order, and fewer.
MESHES = (((2, 4), range(8)), ((1, 8), range(8)), ((8, 1), range(8)), ((4, 2), range(7, -1, -1)))
MESHES += (((2, 2), range(2, 6)), ((1, 1), range(5, 6)))


def placed(step: int, shape: tuple[int, int], devices: range) -> TrainState:
    """The state of the cases, its matrices split over both axes, all else everywhere."""
    mesh = Mesh(np.array([jax.devices()[i] for i in devices]).reshape(shape), ("node", "device"))
    state = cases.state(step, frozen={"table": jax.numpy.arange(64.0).reshape(8, 8)})

    def sharding(leaf: jax.Array) -> NamedSharding:
        axes = ("device", "node") if leaf.shape == (8, 8) else ()
        return NamedSharding(mesh, PartitionSpec(*axes))

    def widened(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.shape != (20, 30) else jax.numpy.tile(leaf, 2)[:8, :8]

    state = jax.tree.map(widened, state)
    return jax.device_put(state, jax.tree.map(sharding, state))


def main(folder: pathlib.Path) -> None:
    """Saves on each mesh, restores on every other."""
    for number, (shape, devices) in enumerate(MESHES[:3]):
        with Checkpoints(folder / str(number)) as saved:
            saved.save(1, placed(1, shape, devices), {})
            assert saved.wait() is None
            for other in MESHES:
                wanted = placed(1, *other)
                cases.assert_same(saved.restore(cases.plan(wanted)).state, wanted)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
    print("all of it held")
