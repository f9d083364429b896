"""Trains: prepares or restores a run, then lets it step, evaluate and save (`train.run`)."""

import contextlib
import dataclasses
import json
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import fields as config_fields
from configs.fields import COMMON, Fields
from jaxmodels.core.task import Task
from jaxmodels.data import pipeline
from jaxmodels.data.fingerprints import differences
from train import devices, distributed, init_from, rundir, starts, storage, table
from train import state as state_lib
from train.checkpoint import Checkpoints, Restored, load_params
from train.errors import UsageError
from train.input import Prefetcher
from train.lock import Lock
from train.run import OWED, Parts, Run, Trained, check_best
from train.state import Layout, TrainState
from train.tasks import check_mesh, load_task
from train.writers import console, open_writers

__all__ = ["Trained", "train"]


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    fields: Fields = COMMON,
    *,
    data_reset: bool = False,
) -> Trained:
    """Trains what `config` describes in `workdir`, continuing where an earlier call stopped.

    SIGTERM and SIGINT end the step, save and return; `Trained.stopped_by` tells of it.

    Args:
      config: from `configs.fields.build`.
      workdir: the run's folder, also gs://...; made where absent.
      fields: of the config; those with `may_change` may differ from the folder's saved config.
      data_reset: continue on other data than saved, from their beginning.

    Raises:
      UsageError: the settings, the folder or its checkpoints cannot be used; nothing was compiled.
      RunError: numbers, storage, data or an evaluator failed.
    """
    began = time.perf_counter()
    workdir = storage.folder(workdir)
    distributed.same_everywhere("config", config_fields.flat(config))
    mesh = devices.start(config)
    task, notes = distributed.together(lambda: _checked_task(config, mesh))
    distributed.first(lambda: storage.probe(workdir, _say))
    storage.check_shared(workdir)
    with contextlib.ExitStack() as stack:
        lock = Lock(workdir, _say)
        distributed.first(lambda: stack.enter_context(lock) and None)
        reset = _Reset(data_reset, fields)
        changed = distributed.first(lambda: rundir.changes(workdir, config, reset.changeable()))
        title = f"training {config.method} for {config.total_steps:,} steps"
        _say("\n  ".join([f"{title}: {devices.describe(mesh)}", *notes]))
        _say("\n  changed since the last start: ".join([f"workdir {workdir}", *changed]))
        stack.enter_context(jax.set_mesh(mesh))
        saved = stack.enter_context(_open_checkpoints(config, workdir))
        plan = distributed.together(lambda: _checked_layout(task, config, mesh))
        found = saved.restore(plan)
        owed = distributed.first(lambda: _owed(workdir, found))
        if found and found.step >= config.total_steps and not owed:
            _say(f"finished already at step {found.step}: nothing to do (raise total_steps)")
            return Trained(found.step, {}, 0.0)
        _say(table.parameter_table(plan))
        progress = dict(found.progress) if found else {}
        batches, fingerprint = distributed.together(
            lambda: _open_data(task, config, mesh, progress, (data_reset, reset.needed(changed)))
        )
        stack.enter_context(contextlib.closing(batches))
        state = found.state if found else _new_state(task, config, mesh, plan)
        distributed.first(lambda: rundir.save_config(workdir, config))
        distributed.first(lambda: _record_start(workdir, mesh, found))
        opened = open_writers(workdir, config, found.step if found else 0)
        writers = distributed.together(lambda: stack.enter_context(opened))
        writers.say(f"continuing from step {found.step}" if found else "starting from step 0")
        parts = Parts(
            task,
            config,
            mesh,
            plan,
            workdir,
            lock,
            saved,
            writers,
            batches,
            fingerprint,
            bool(owed),
        )
        return Run(parts, progress, began).run(state)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        console.say(text)


def _checked_task(config: ConfigDict, mesh: Mesh) -> tuple[Task, list[str]]:
    """The task, and what it says of training on the mesh."""
    task = load_task(config)
    check_best(config, task)
    return task, check_mesh(task, mesh)


@dataclasses.dataclass(frozen=True)
class _Reset:
    """Whether other data may take the place of those saved, and whether the settings say so.

    A command with --data_reset that is given again, after a preemption, does not start the data
    anew: only settings or a pipeline other than the saved ones do.
    """

    wanted: bool
    fields: Fields

    def changeable(self) -> Fields:
        """The fields, those of the data with `may_change` where the data may be replaced."""
        if not self.wanted:
            return self.fields
        return {
            name: dataclasses.replace(field, may_change=True) if self._of_data(name) else field
            for name, field in self.fields.items()
        }

    def needed(self, changed: list[str]) -> bool:
        """Whether a setting among those changed means other examples or another order."""
        names = {line.split(" ")[0] for line in changed}
        return any(
            self._of_data(name) and not self.fields[name].may_change
            for name in names & self.fields.keys()
        )

    @staticmethod
    def _of_data(name: str) -> bool:
        return name.startswith("data.") or name in ("batch_size", "seed")


def _open_checkpoints(config: ConfigDict, workdir: epath.Path) -> Checkpoints:
    return Checkpoints(
        workdir,
        keep=config.keep_checkpoints,
        keep_best=config.keep_best,
        best_metric=config.best_metric,
        best_mode=config.best_mode,
        say=_say,
    )


def _checked_layout(task: Task, config: ConfigDict, mesh: Mesh) -> Layout:
    try:
        return state_lib.layout(task, config, mesh)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _record_start(workdir: epath.Path, mesh: Mesh, found: Restored | None) -> None:
    step = found.step if found else 0
    starts.record_start(workdir, step, [devices.describe(mesh)], jax.process_count(), _say)


def _owed(workdir: epath.Path, found: Restored | None) -> bool:
    """Whether the evaluation of the restored step was interrupted; forgets that of another step."""
    note = workdir / OWED
    if not note.exists():
        return False
    if found and note.read_text().strip() == str(found.step):
        return True
    note.unlink()
    return False


def _new_state(task: Task, config: ConfigDict, mesh: Mesh, plan: Layout) -> TrainState:
    """A fresh state, with the weights of `warm_start` or `init_from` where one is given."""
    if config.init_from is not None:
        return _with_published(task, config, mesh, plan)
    if config.warm_start is None:
        return state_lib.create(task, config, mesh, plan)
    try:
        params, _ = load_params(config.warm_start, plan.abstract.params)  # before any compilation
    except UsageError as error:
        raise UsageError(f"warm_start={config.warm_start}: {error}") from error
    trainable, frozen = state_lib.split(params, plan.groups)
    state = state_lib.create(task, config, mesh, plan)
    return dataclasses.replace(state, trainable=trainable, frozen=frozen)


def _with_published(task: Task, config: ConfigDict, mesh: Mesh, plan: Layout) -> TrainState:
    if config.warm_start is not None:
        raise UsageError("init_from and warm_start both say what training starts from: give one")
    found = distributed.together(
        lambda: init_from.load(  # before any compilation
            config.init_from, plan.abstract.params, config.init_rows
        )
    )
    # On disks of their own, processes may have read different ones.
    distributed.same_everywhere("init_from", {"weights": found.digest[:12]})
    state = state_lib.create(task, config, mesh, plan)
    trainable, frozen = state_lib.split(init_from.filled(state.params, found), plan.groups)
    _say(found.line)
    return dataclasses.replace(state, trainable=trainable, frozen=frozen)


def _open_data(
    task: Task,
    config: ConfigDict,
    mesh: Mesh,
    progress: dict[str, Any],
    reset: tuple[bool, bool],
) -> tuple[Prefetcher, Any]:
    """Opens the training data at the saved position; refuses another pipeline than the saved.

    `reset` is whether other data are wanted, and whether the settings ask for them.
    """
    wanted, other = reset
    dataset = _checked_datasets(task)
    fingerprint = json.loads(json.dumps(getattr(dataset, "fingerprint", None)))
    changed = "; ".join(differences(progress.get("fingerprint", fingerprint), fingerprint))
    position = progress.get("position")
    if changed and not wanted:
        raise UsageError(
            f"the data pipeline is not the one saved: {changed}; give the saved settings, or "
            f"--data_reset to go on with these data. With it {pipeline.what_is_lost(position)}"
        )
    if progress and (other or changed):
        _say(f"--data_reset: {pipeline.what_is_lost(position)} {changed and f'({changed})'}")
        position = None
    try:
        batches = Prefetcher(dataset, mesh, position, timeout_seconds=config.data.timeout_seconds)
    except ValueError as error:
        raise UsageError(f"the saved data position cannot be used: {error}") from error
    return batches, fingerprint


def _checked_datasets(task: Task) -> Any:
    """The training data; these and the evaluators' are opened before anything is compiled."""
    try:
        for evaluator in task.evaluators().values():
            evaluator.dataset()
        return task.datasets("train")
    except ValueError as error:
        raise UsageError(str(error)) from error
