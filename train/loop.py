"""Trains: prepares or restores a run, then steps, evaluates and saves until `total_steps`."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.fields import COMMON, Fields
from jaxmodels.core.task import Task
from train import devices, rundir, table
from train import state as state_lib
from train.checkpoint import Checkpoints, load_params
from train.clock import Clock
from train.compiled import PerShape, shapes
from train.errors import UsageError
from train.evaluation import Evaluation, Results
from train.flops import peak_flops
from train.input import Placed, Prefetcher
from train.metrics import Counters
from train.state import Layout, TrainState
from train.step import make_train_step
from train.steplog import StepLog
from train.tasks import load_task
from train.writers import Console, JsonLines, TensorBoard, Writers, duration


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a call of `train` leaves behind.

    Attributes:
      step: updates made in all, earlier calls included.
      results: the last evaluation; empty where the run had been finished before.
      seconds: of training in all, without compiling, evaluating and saving.
    """

    step: int
    results: Results
    seconds: float


def train(config: ConfigDict, workdir: epath.PathLike, fields: Fields = COMMON) -> Trained:
    """Trains what `config` describes in `workdir`, continuing where an earlier call stopped.

    Args:
      config: from `configs.fields.build`.
      workdir: the run's folder; made where absent.
      fields: of the config; those with `may_change` may differ from the folder's saved config.

    Raises:
      UsageError: the settings, the folder or its checkpoints cannot be used; nothing was compiled.
    """
    workdir = epath.Path(workdir).expanduser()
    mesh = devices.start(config)
    task = load_task(config)
    changed = rundir.changes(workdir, config, fields)
    _say(f"training {config.method} for {config.total_steps:,} steps: {devices.describe(mesh)}")
    _say("\n  changed since the last start: ".join([f"workdir {workdir}", *changed]))
    with jax.set_mesh(mesh), Checkpoints(workdir, config.keep_checkpoints) as saved:
        latest = saved.latest_step() or 0
        if latest >= config.total_steps:
            _say(f"finished already at step {latest}: nothing to do (raise total_steps to go on)")
            return Trained(latest, {}, 0.0)
        plan = _checked_layout(task, config, mesh)
        _say(table.parameter_table(plan))
        state, progress = _start_state(task, config, mesh, plan, saved)
        if jax.process_index() == 0:
            rundir.save_config(workdir, config)
        data = _open_data(task, mesh, progress)
        with contextlib.closing(data.batches), _open_writers(workdir, config, latest) as writers:
            writers.say(f"continuing from step {latest}" if latest else "starting from step 0")
            return _Run(task, config, mesh, plan, saved, writers, data, progress).run(state)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _checked_layout(task: Task, config: ConfigDict, mesh: Mesh) -> Layout:
    try:
        return state_lib.layout(task, config, mesh)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _start_state(
    task: Task, config: ConfigDict, mesh: Mesh, plan: Layout, saved: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint's state and progress; else a fresh state, weights from `warm_start`."""
    latest = saved.latest_step()
    if latest is not None:
        return saved.restore(plan, latest)
    if config.warm_start is None:
        return state_lib.create(task, config, mesh, plan), {}
    try:
        params, _ = load_params(config.warm_start, plan.abstract.params)  # before any compilation
    except UsageError as error:
        raise UsageError(f"warm_start={config.warm_start}: {error}") from error
    trainable, frozen = state_lib.split(params, plan.groups)
    state = state_lib.create(task, config, mesh, plan)
    return dataclasses.replace(state, trainable=trainable, frozen=frozen), {}


@dataclasses.dataclass(frozen=True)
class _Data:
    """The training batches, and what identifies the pipeline that they come from."""

    batches: Prefetcher
    fingerprint: Any


def _open_data(task: Task, mesh: Mesh, progress: dict[str, Any]) -> _Data:
    """Opens the training data at the saved position; refuses another pipeline than the saved."""
    dataset = task.datasets("train")
    fingerprint = json.loads(json.dumps(getattr(dataset, "fingerprint", None)))
    _check_fingerprint(progress.get("fingerprint", fingerprint), fingerprint)
    try:
        return _Data(Prefetcher(dataset, mesh, progress.get("position")), fingerprint)
    except ValueError as error:
        raise UsageError(f"the saved data position cannot be used: {error}") from error


@contextlib.contextmanager
def _open_writers(workdir: epath.Path, config: ConfigDict, step: int) -> Iterator[Writers]:
    """The console, metrics.jsonl and TensorBoard; nothing on processes but the first."""
    if jax.process_index() != 0:
        yield Writers()
        return
    writers = Writers(
        JsonLines(workdir / "metrics.jsonl", step),
        TensorBoard(workdir / "tensorboard", step),
        Console(config.total_steps),
    )
    with contextlib.closing(writers):
        yield writers


class _Run:
    """One run from its starting state to its end: what the steps share."""

    def __init__(
        self,
        task: Task,
        config: ConfigDict,
        mesh: Mesh,
        plan: Layout,
        saved: Checkpoints,
        writers: Writers,
        data: _Data,
        progress: dict[str, Any],
    ):
        self.config, self.saved, self.writers, self.data = config, saved, writers, data
        self.steps = PerShape(make_train_step(task, config, mesh, plan))
        self.evaluation = Evaluation(task, mesh)
        self.clock = Clock(progress.get("seconds", 0.0), progress.get("pauses"))
        kinds = {device.device_kind for device in mesh.devices.flat}
        peak = peak_flops(kinds.pop()) if len(kinds) == 1 else None
        self.log = StepLog(
            writers,
            self.clock,
            peak * mesh.size if peak else None,
            Counters(**progress.get("counters", {})),
        )

    def run(self, state: TrainState) -> Trained:
        """Steps until the end; the last evaluation and checkpoint are always made."""
        with jax.transfer_guard("disallow"):
            results: Results = {}
            while self.log.counters.step < self.config.total_steps:
                placed = self._next_batch()
                state = self._step(state, placed)
                if self._due(self.config.eval_every):
                    results = self._evaluate(state)
                if self._due(self.config.checkpoint_every):
                    self._save(state, placed)
        with self.clock.pause("save"):
            self.saved.wait()
        self._summary()
        return Trained(self.log.counters.step, results, self.clock.seconds)

    def _due(self, every: int) -> bool:
        step = self.log.counters.step
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def _next_batch(self) -> Placed:
        before = self.data.batches.waited
        try:
            placed = next(self.data.batches)
        except StopIteration:
            raise RuntimeError(
                f"the training data ended after {self.log.counters.step} of "
                f"{self.config.total_steps} steps: repeat the data set or lower total_steps"
            ) from None
        self.log.waited(self.data.batches.waited - before)
        return placed

    def _step(self, state: TrainState, placed: Placed) -> TrainState:
        if not self.steps.ready(placed.batch):
            self._compile(state, placed)
        step = self.log.counters.step + 1
        logged = step == 1 or step == self.config.total_steps or step % self.config.log_every == 0
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = self.steps(state, placed.batch)
        self.log.started(metrics, placed, self.steps.flops(placed.batch), logged)
        return state

    def _compile(self, state: TrainState, placed: Placed) -> None:
        self.log.flush()
        before = self.steps.seconds
        with self.clock.pause("compile"):
            self.steps.prepare(state, placed.batch)
        flops = self.steps.flops(placed.batch)
        self.writers.say(
            f"compiled the step in {self.steps.seconds - before:.1f} s, {flops / 1e9:,.4g} GFLOP, "
            f"for batches with {shapes(placed.batch)}"
        )

    def _evaluate(self, state: TrainState) -> Results:
        self.log.flush()
        with self.clock.pause("evaluate"):
            results = self.evaluation.run(state.params)
        step = self.log.counters.step
        for name, values in results.items():
            self.writers.write(step, name, values | {"seconds": self.clock.seconds})
        return results

    def _save(self, state: TrainState, placed: Placed) -> None:
        """Saves what the steps so far have made, after their metrics are on disk."""
        self.log.flush()
        progress = {
            "position": placed.position,
            "fingerprint": self.data.fingerprint,
            "seconds": self.clock.seconds,
            "pauses": self.clock.pauses,
            "counters": dataclasses.asdict(self.log.counters),
        }
        with self.clock.pause("save"), jax.transfer_guard("allow"):
            self.saved.save(state, progress)

    def _summary(self) -> None:
        """One line: where the wall time went."""
        parts = {"training": self.clock.seconds, **self.clock.pauses}
        total = sum(parts.values())
        shares = ", ".join(f"{name} {share / total:.0%}" for name, share in parts.items())
        self.writers.say(f"done: {self.log.counters.step} steps in {duration(total)} ({shares})")


def _check_fingerprint(before: Any, now: Any) -> None:
    """Refuses to continue on another pipeline: its positions would mean other examples."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        before, now = ({k: d.get(k) for k in changed} for d in (before, now))
    raise UsageError(f"the data pipeline is not the one saved: it was {before}, now it is {now}")
