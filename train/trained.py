"""A finished or running run, opened for use: its task and its weights from the folder alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmodels.core.task import Task
from train import checkpoint, cli, devices, rundir
from train import state as state_lib
from train.tasks import load_task


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """The config, task, mesh and parameters (nested dict, placed) of a run at one step."""

    config: ConfigDict
    task: Task
    mesh: Mesh
    params: Any
    step: int


def open_run(
    workdir: epath.PathLike, step: int | None = None, overrides: Mapping[str, str] | None = None
) -> OpenRun:
    """Opens the run in `workdir` at `step` (the newest checkpoint by default).

    Args:
      workdir: the folder given to `train.main`.
      step: a step that has a checkpoint.
      overrides: {field: value as text} on top of the saved config.

    Raises:
      UsageError: no run or checkpoint is there, or the overrides do not fit it.
    """
    config, fields = rundir.load_config(workdir)
    config = cli.override(config, fields, overrides or {})
    checkpoint.find(workdir, step)
    mesh = devices.start(config)
    task = load_task(config)
    with jax.set_mesh(mesh):
        abstract = state_lib.abstract_params(task, mesh)
        params, step = checkpoint.load_params(workdir, abstract, step)
    return OpenRun(config, task, mesh, params, step)
