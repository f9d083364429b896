"""Times an asynchronous save: how long it holds the loop, when it is on disk, what it costs."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import fields as config_fields
from train import devices
from train import state as state_lib
from train.checkpoint import Checkpoints
from train.input import place
from train.step import make_train_step
from train.tasks import load_task


@dataclasses.dataclass(frozen=True)
class Saves:
    """Seconds of each save.

    Attributes:
      megabytes: 10^6 bytes of the state.
      held: until training may go on.
      on_disk: until the manifest is written, with training going on.
      lost: what the steps meanwhile took longer than without a save, `held` included.
      step: of a step without a save, the median.
    """

    megabytes: float
    held: tuple[float, ...]
    on_disk: tuple[float, ...]
    lost: tuple[float, ...]
    step: float

    def to_dict(self) -> dict[str, Any]:
        """Returns medians in seconds, and all values."""
        found: dict[str, Any] = {"megabytes": self.megabytes, "step_ms": 1e3 * self.step}
        for name in ("held", "on_disk", "lost"):
            values = getattr(self, name)
            found |= {f"{name}_s": float(np.median(values)), f"{name}_all": list(values)}
        return found


class _Training:
    """A compiled step that runs on one batch, with its state."""

    def __init__(self, fields: config_fields.Fields, settings: Mapping[str, Any]):
        config = config_fields.build(fields, settings)
        mesh = devices.start(config)
        task = load_task(config)
        with jax.set_mesh(mesh):
            plan = state_lib.layout(task, config, mesh)
            self.state = state_lib.create(task, config, mesh, plan)
            self.batch = place(next(iter(task.datasets("train"))), mesh).batch
            step = make_train_step(task, config, mesh, plan)
            self.program = step.lower(self.state, self.batch).compile()

    def steps(self, count: int) -> float:
        """Makes that many steps; returns the seconds."""
        start = time.perf_counter()
        for _ in range(count):
            self.state, *_ = self.program(self.state, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def measure_saves(
    fields: config_fields.Fields,
    settings: Mapping[str, Any],
    workdir: Path,
    *,
    rounds: int = 7,
    warmup: int = 1,
) -> Saves:
    """Saves a state `rounds` times while training goes on, in turn with training alone.

    Args:
      fields: of the config.
      settings: {dotted field: value}.
      workdir: on the disk that is asked about; removed afterwards.
      rounds: counted saves.
      warmup: saves before those.
    """
    training = _Training(fields, settings)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state) if hasattr(leaf, "nbytes"))
    training.steps(3)
    held, on_disk, lost, alone = [], [], [], []
    count = 1
    try:
        with Checkpoints(workdir, keep=1) as saved:
            for number in range(warmup + rounds):
                seconds = training.steps(count)
                alone.append(seconds / count)
                start = time.perf_counter()
                saved.save(number + 1, training.state, {"counters": {"step": number + 1}})
                released = time.perf_counter()
                made = _step_until_saved(training, saved)
                done = time.perf_counter()
                if number >= warmup:
                    held.append(released - start)
                    on_disk.append(done - start)
                    lost.append(done - start - made * float(np.median(alone)))
                count = max(made, 3)
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    return Saves(size / 1e6, tuple(held), tuple(on_disk), tuple(lost), float(np.median(alone)))


def _step_until_saved(training: _Training, saved: Checkpoints) -> int:
    """Trains until the save under way is on disk; returns the steps made meanwhile.

    Raises:
      OSError: the save failed.
    """
    latest, made = saved.latest_step(), 0
    while saved.latest_step() == latest:
        training.steps(1)
        made += 1
        if reason := saved.poll():
            raise OSError(reason)
    if reason := saved.wait():
        raise OSError(reason)
    return made
