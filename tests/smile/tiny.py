"""A masked LM so small that it trains in seconds: its command line, and what a run leaves."""

import pathlib
from typing import Any

import jax
import numpy as np

from jaxmodels.core import params as param_tree
from tests.multiprocess import launcher
from tests.train import runs
from train import devices, rundir, storage
from train import main as train_main
from train import state as state_lib
from train.checkpoint import Checkpoints
from train.tasks import load_task

SETTINGS = {
    "total_steps": 20,
    "log_every": 1,
    "checkpoint_every": 10,
    "batch_size": 8,
    "optimizer.warmup_steps": 4,
    # Without momentum and clipping the first moments are the gradients of the last step.
    "optimizer.b1": 0,
    "optimizer.clip_norm": 0,
    "model.vocab_size": 300,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.d_ff": 24,
    "model.max_positions": 32,
    "data.name": "text_lines",
    "data.files": launcher.ROOT / "LICENSE",  # a text that stays as it is
    "data.length": 32,
}
BI_LEVEL = {"moe.routing": "bi_level"}
TWO_HOP = {"moe.routing": "one_level", "moe.transport": "two_hop"}
# Parts of these names are times, or follow from them.
_TIMES = ("second", "step_ms", "data_wait", "split")


def flags(grid: tuple[int, int], *settings: dict[str, Any]) -> tuple[str, ...]:
    """The command line: a grid of nodes x devices with one expert a cell, and more settings."""
    nodes, own = grid
    found = SETTINGS | {"moe.nodes": nodes, "moe.devices": own, "moe.num_experts": nodes * own}
    for values in settings:
        found = found | values
    named = (f"--config.{name}={value}" for name, value in found.items())
    return ("--config=configs/smile.py:debug", *named)


def places(workdir: pathlib.Path) -> tuple[str, str]:
    """Flags for the workdir, and for data that lie beside it."""
    return f"--workdir={workdir}", f"--config.data.dir={workdir.parent}/data"


def train(workdir: pathlib.Path, *words: str) -> pathlib.Path:
    """Trains in this process; returns the workdir."""
    train_main.main([*words, *places(workdir)])
    return workdir


def curve(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """{metric: its values, step by step}, without times."""
    lines = runs.lines(workdir)
    names = [name for name in lines[0] if not any(part in name for part in _TIMES)]
    return {name: np.array([line[name] for line in lines]) for name in names}


def state(workdir: pathlib.Path, **mesh: int) -> state_lib.TrainState:
    """The newest state of a run, on a mesh of this process's devices."""
    config, _ = rundir.load_config(workdir)
    config.mesh.update({"node": -1, "device": -1} | mesh)
    mesh_here = devices.start(config)
    with jax.set_mesh(mesh_here), Checkpoints(storage.folder(workdir)) as saved:
        return saved.restore(state_lib.layout(load_task(config), config, mesh_here)).state


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Parameters, or what has their shape, as NumPy arrays by path."""
    return param_tree.flatten(jax.device_get(tree))


def gradients(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Of the last step: Adam's first moments without momentum."""
    found: dict[str, np.ndarray] = {}
    is_moments = lambda part: hasattr(part, "mu")  # noqa: E731
    for part in jax.tree.leaves(state(workdir).opt_state, is_leaf=is_moments):
        if is_moments(part):
            found |= {p: leaf for p, leaf in flat(part.mu).items() if leaf is not None}
    return found
