"""Run by test_checkpoint.py with eight simulated devices: trains on 2 x 4, continues on 4 x 2."""

import json
import pathlib
import sys

import jax
import numpy as np

from jaxmodels.core import params as param_tree
from tests.multiprocess import reference
from tests.smile import tiny
from train.state import TrainState

GRID = (4, 4)  # both meshes divide it
PATH = "moe_layers/moe/experts/wi"


def laid(state: TrainState) -> list[list[int]]:
    """The experts that each device of the mesh holds, in its order, of parameters and moments."""
    experts = param_tree.flatten(state.params)[PATH]
    where = experts.sharding.devices_indices_map(experts.shape)
    mesh = experts.sharding.mesh
    held = [list(range(experts.shape[1]))[where[device][1]] for device in mesh.devices.flat]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == experts.shape]
    assert len(moments) == 2 and all(m.sharding == experts.sharding for m in moments)
    return held


def main(folder: pathlib.Path) -> dict[str, object]:
    """Both runs, and where the experts lie on each mesh."""
    flags = tiny.flags(GRID, tiny.BI_LEVEL)
    whole = tiny.train(folder / "whole", *flags, "--config.mesh.node=2")
    reference.copy_until(10, whole, folder / "copy")
    two, four = (tiny.state(folder / "copy", node=nodes) for nodes in (2, 4))
    pairs = zip(jax.tree.leaves(two), jax.tree.leaves(four), strict=True)
    found = {
        "laid": {"2x4": laid(two), "4x2": laid(four)},
        "same_bits": all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs if a.ndim),
    }
    tiny.train(folder / "copy", *flags, "--config.mesh.node=4")
    return found


if __name__ == "__main__":
    print(json.dumps(main(pathlib.Path(sys.argv[1]))))
