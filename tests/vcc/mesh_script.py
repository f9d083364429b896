"""Run by test_mesh.py with eight simulated devices: a few VCC training steps on meshes named."""

import contextlib
import json
import sys

import jax

from configs import fields, vcc
from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from train import state as state_lib
from train.input import Prefetcher
from train.step import make_train_step
from train.tasks import load_task

SMALL = {
    "data.length": 128,
    "data.fact_groups": 2,
    "data.train_documents": 64,
    "data.curriculum_lengths": (),
    "data.curriculum_groups": (),
    "data.curriculum_batches": (),
    "data.curriculum_steps": (),
    "batch_size": 16,
    "model.num_fine_blocks": 3,
    "model.remat": "full",
}


def losses(node: int, device: int, data_dir: str) -> dict[str, object]:
    """Four training steps on one mesh: losses, and how the word table lies."""
    changed = SMALL | {"data.dir": data_dir}
    config = fields.build(vcc.FIELDS, vcc.PRESETS["quickstart"] | changed)
    mesh = partitioning.make_mesh(node, device, jax.devices()[: node * device])
    task = load_task(config)
    found = []
    with jax.set_mesh(mesh):
        plan = state_lib.layout(task, config, mesh)
        state = state_lib.create(task, config, mesh, plan)
        step = make_train_step(task, config, mesh, plan)
        with contextlib.closing(Prefetcher(task.datasets("train"), mesh)) as batches:
            for _ in range(4):
                state, metrics, _ = step(state, next(batches).batch)
                found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    table = params_lib.flatten(state.trainable)["trunk/embeddings/word/embedding"]
    return {"losses": found, "rows": table.sharding.shard_shape(table.shape)[0]}


if __name__ == "__main__":
    folder, *meshes = sys.argv[1:]
    shapes = {mesh: tuple(map(int, mesh.split("x"))) for mesh in meshes}
    print(json.dumps({mesh: losses(*shape, folder) for mesh, shape in shapes.items()}))
