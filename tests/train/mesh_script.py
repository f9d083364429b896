"""Run by test_mesh.py with eight simulated devices: trains on every mesh, prints what it found."""

import contextlib
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np

from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from tests.train import runs, toy, toy_config
from train import state as state_lib
from train.errors import UsageError
from train.input import Prefetcher
from train.loop import train
from train.step import make_train_step
from train.trained import open_run

MESHES = ((1, 1), (1, 8), (2, 4), (8, 1))
RUN = {"checkpoint_every": 10, "eval_every": 10, "mesh__node": 2, "mesh__device": 4}


def few_steps(node: int, device: int, parts: int) -> dict[str, Any]:
    """Five steps on one mesh: the losses, a sum of each parameter, and how things lie."""
    config = runs.config(micro_batches=parts, optimizer__name="adamw")
    mesh = partitioning.make_mesh(node, device, jax.devices()[: node * device])
    task = toy.make_task(config)
    with jax.set_mesh(mesh):
        plan = state_lib.layout(task, config, mesh)
        state = state_lib.create(task, config, mesh, plan)
        start = {k: np.asarray(v).tobytes() for k, v in params_lib.flatten(state.params).items()}
        step, losses = make_train_step(task, config, mesh, plan), []
        with contextlib.closing(Prefetcher(task.datasets("train"), mesh)) as batches:
            for _ in range(5):
                placed = next(batches)
                state, metrics, _ = step(state, placed.batch)
                losses.append([float(total / weight) for total, weight in metrics.values()])
    moment = next(s for s in jax.tree.leaves(state.opt_state) if s.shape == (64, 64))
    return {
        "start": hash(tuple(sorted(start.items()))),
        "losses": losses,
        "sums": {k: float(np.abs(v).sum()) for k, v in params_lib.flatten(state.params).items()},
        "kernel": str(state.trainable["hidden"]["kernel"].sharding.spec),
        "moment_shard": moment.sharding.shard_shape(moment.shape),
        "batch_shard": placed.batch["input_ids"].sharding.shard_shape(
            placed.batch["input_ids"].shape
        ),
        "laid_out_as_planned": all(
            a.sharding.is_equivalent_to(b.sharding, a.ndim)
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plan.abstract), strict=True)
        ),
    }


def resumed(whole: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """Continues a copy of a run from step 10 and compares with the run never stopped."""
    workdir = whole.with_name("-".join(["copy", *map(str, changes.values())]))
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    config = runs.config(**RUN | changes)
    train(config, workdir, toy_config.FIELDS)
    one, other = (params_lib.flatten(jax.device_get(open_run(w).params)) for w in (whole, workdir))
    return {
        "curves": [list(runs.curve(w).values()) for w in (whole, workdir)],
        "same_weights": all((one[path] == other[path]).all() for path in one),
    }


def weights_move_between_meshes(whole: pathlib.Path) -> bool:
    """Whether one checkpoint holds the same bits on every mesh."""
    found = []
    for node, device in MESHES[1:]:
        run = open_run(whole, 10, {"mesh.node": str(node), "mesh.device": str(device)})
        found.append(params_lib.flatten(jax.device_get(run.params)))
    return all((found[0][k] == other[k]).all() for other in found for k in other)


def main(folder: pathlib.Path) -> dict[str, Any]:
    """Everything, as JSON."""
    whole = folder / "whole"
    train(runs.config(**RUN), whole, toy_config.FIELDS)
    try:
        train(runs.config(batch_size=12), folder / "odd", toy_config.FIELDS)
        refusal = ""
    except UsageError as error:
        refusal = str(error)
    return {
        "meshes": {f"{n}x{d}": few_steps(n, d, 1) for n, d in MESHES},
        "in_parts": {f"{n}x{d}": few_steps(n, d, 2) for n, d in ((1, 1), (2, 4))},
        "same_mesh": resumed(whole),
        "other_mesh": resumed(whole, mesh__node=8, mesh__device=1),
        "weights_move": weights_move_between_meshes(whole),
        "refusal": refusal,
    }


if __name__ == "__main__":
    found = main(pathlib.Path(sys.argv[1]))
    print("\n" + json.dumps(found))
