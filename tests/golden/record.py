"""Records the golden losses of this Python: python -m tests.golden.record

They depend on the text that this Python's documentation gives (`topics_sha256`), so that there is
one entry for each text. Record again, and say why in the commit, when a change is meant to alter
training: another start, other defaults, other data.
"""

import contextlib
import json
import pathlib
import platform
from typing import Any

import jax
from ml_collections import ConfigDict

from configs.vcc import get_config
from jaxmodels.core import partitioning
from jaxmodels.core.task import Task
from train import state as state_lib
from train.compiled import PerShape
from train.input import Prefetcher
from train.step import make_train_step
from train.tasks import load_task

STORE = pathlib.Path(__file__).with_name("vcc_quickstart.json")
STEPS = 100


def quickstart(data_dir: str | None = None) -> tuple[ConfigDict, Task]:
    """The quickstart's config and task; fewer long documents, which come after these steps."""
    config = get_config("quickstart")
    with config.unlocked():
        config.data.dir, config.data.train_documents = data_dir, 8
    return config, load_task(config)


def topics_sha256(task: Any) -> str:
    """Identifies the text that this Python's documentation gives; builds the first stage's data."""
    length, groups, documents, _, _ = task.stages[0]
    return task.source("train", length, groups, documents).fingerprint["topics_sha256"]


def losses(config: ConfigDict, task: Task, steps: int = STEPS) -> tuple[list[float], int]:
    """Trains by the trainer's own step and input; returns losses and programs compiled."""
    mesh = partitioning.make_mesh(1, 1, jax.devices()[:1])
    found = []
    with jax.set_mesh(mesh):
        state = state_lib.create(task, config, mesh)
        step = PerShape(make_train_step(task, config, mesh))
        with contextlib.closing(Prefetcher(task.datasets("train"), mesh)) as batches:
            for _ in range(steps):
                state, metrics, _ = step(state, next(batches).batch)
                total, weight = metrics["loss"]
                found.append(float(total) / float(weight))
    return found, step.compilations


def stored() -> dict[str, Any]:
    """Entries by the hash of their text."""
    return json.loads(STORE.read_text()) if STORE.exists() else {}


if __name__ == "__main__":
    config, task = quickstart()
    values, _ = losses(config, task)
    entry = {"python": platform.python_version(), "jax": jax.__version__}
    entry["losses"] = [round(value, 6) for value in values]
    STORE.write_text(json.dumps(stored() | {topics_sha256(task): entry}, indent=1) + "\n")
    print(f"{STORE}: losses of {STEPS} steps for Python {entry['python']}")
