"""Compares the ends of two runs of one config bit by bit: their metrics and their whole state."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import devices, rundir
from train import state as state_lib
from train.checkpoint import Checkpoints
from train.tasks import load_task

# What a line of metrics.jsonl says of time, and not of training.
TIMES = (
    *("examples_per_second", "tokens_per_second", "step_ms", "data_wait", "mfu"),
    *("seconds", "compile_seconds", "evaluation_seconds"),
)


def differences(one: Path, other: Path) -> list[str]:
    """Returns what differs between two finished runs, a line each; nothing where they are equal.

    Every line of metrics.jsonl without its times, every leaf of the newest checkpoint (parameters,
    optimiser, step, random key), and the data position saved with it.
    """
    found = _different_lines(one, other)
    states = [_state(folder) for folder in (one, other)]
    names = sorted(states[0].keys() | states[1].keys())
    return found + [f"{name} differs" for name in names if not _same(name, *states)]


def _different_lines(one: Path, other: Path) -> list[str]:
    records = [_records(folder) for folder in (one, other)]
    found = []
    for key in sorted(records[0].keys() | records[1].keys()):
        first, second = (own.get(key, "absent") for own in records)
        if first != second:
            step, split = key
            found.append(f"metrics.jsonl, step {step}, {split}: {first} against {second}")
    return found


def _records(folder: Path) -> dict[tuple[int, str], Any]:
    """{(step, split): values without times, as exact text}; a repeated line is a list of two."""
    found: dict[tuple[int, str], Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = record.pop("step"), record.pop("split")
        text = json.dumps({k: v for k, v in record.items() if k not in TIMES})
        found[key] = text if key not in found else [found[key], text]
    return found


def _state(folder: Path) -> dict[str, Any]:
    """{path: array} of the newest checkpoint, with its step and data position."""
    config, _ = rundir.load_config(folder)
    mesh = devices.start(config)
    with jax.set_mesh(mesh), Checkpoints(folder) as saved:
        found = saved.restore(state_lib.layout(load_task(config), config, mesh))
    if found is None:
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(found.state)
    made = {jax.tree_util.keystr(path): _array(leaf) for path, leaf in leaves}
    return made | {"step of the checkpoint": found.step, "position": found.progress["position"]}


def _array(leaf: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _same(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    if name not in one or name not in other:
        return False
    first, second = one[name], other[name]
    if not isinstance(first, np.ndarray):
        return first == second
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.tobytes() == second.tobytes()
