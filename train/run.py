"""The loop: steps, evaluations and checkpoints until `total_steps` or until asked to stop."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmodels.core.task import Task
from train import storage
from train.aot import memory
from train.checkpoint import Checkpoints, retry_line
from train.clock import Clock
from train.compiled import PerShape, shapes
from train.errors import RunError, UsageError
from train.evaluation import Evaluation, Results
from train.finite import FiniteCheck
from train.flops import peak_flops
from train.input import Placed, Prefetcher, shared_position
from train.lock import Lock
from train.metrics import Counters
from train.profile import Profile
from train.signals import StopRequest
from train.state import Layout, TrainState
from train.step import make_train_step, trainable_paths
from train.steplog import StepLog
from train.watchdog import Watchdog
from train.writers import Writers
from train.writers.console import duration

OWED = "evaluation_owed"  # file that holds the step of an evaluation that was interrupted


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a call of `train` leaves behind.

    Attributes:
      step: updates made in all, earlier calls included.
      results: the last evaluation; empty where the run had been finished before.
      seconds: of training in all, without compiling, evaluating and saving.
      stopped_by: the signal that ended the run early, its state saved; None at the planned end.
    """

    step: int
    results: Results
    seconds: float
    stopped_by: str | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of: the task laid out on the mesh, its batches, and where results go.

    Attributes:
      fingerprint: identifies the pipeline that `batches` come from.
      owed: whether the evaluation of the starting step was interrupted and is to be made first.
    """

    task: Task
    config: ConfigDict
    mesh: Mesh
    plan: Layout
    workdir: epath.Path
    lock: Lock
    saved: Checkpoints
    writers: Writers
    batches: Prefetcher
    fingerprint: Any
    owed: bool


class Run:
    """One run from its starting state to its end."""

    def __init__(self, parts: Parts, progress: dict[str, Any], began: float):
        """Takes the parts, the `progress` of the checkpoint (empty at step 0), and the start.

        Args:
          parts: what the run works with.
          progress: as `_save` wrote it.
          began: `time.perf_counter()` when the command began.
        """
        self._parts, config = parts, parts.config
        self._config, self._saved, self._writers = config, parts.saved, parts.writers
        self._steps = PerShape(make_train_step(parts.task, config, parts.mesh, parts.plan))
        self._evaluation = Evaluation(parts.task, parts.mesh, config.data.timeout_seconds)
        self._clock = Clock(progress.get("seconds", 0.0), progress.get("pauses"), began)
        counters = Counters(**progress.get("counters", {}))
        finite = FiniteCheck(
            trainable_paths(parts.plan), config.on_nonfinite == "skip", counters.skipped
        )
        peak = _peak(parts.mesh)
        self._log = StepLog(parts.writers, self._clock, finite, peak, counters)
        self._stop = StopRequest()
        self._watchdog = Watchdog(config.watchdog_seconds, self._doing)
        self._profile = Profile(parts.workdir, config.profile, parts.writers.say)
        self._position = progress.get("position")
        self._owed = parts.owed
        self._metric: tuple[int, float | None] = (-1, None)  # step and value of best_metric
        self._last_saved = counters.step if progress else 0
        self._retries = sum(storage.RETRIES.values())

    @property
    def step(self) -> int:
        """Steps started so far."""
        return self._log.counters.step

    def run(self, state: TrainState) -> Trained:
        """Steps until the end; the last evaluation and checkpoint are always made.

        Raises:
          RunError: numbers, storage, data or an evaluator failed; what was saved before is whole.
        """
        end = "failed"
        try:
            with self._stop, self._watchdog, jax.transfer_guard("disallow"):
                state, results = self._train(state)
                self._finish_saving(state)
            end = "stopped" if self._stop.signal_name else "done"
        finally:
            self._profile.close()
            self._summary(end)
        return Trained(self.step, results, self._clock.seconds, self._stop.signal_name)

    def _train(self, state: TrainState) -> tuple[TrainState, Results]:
        results: Results = {}
        if self._owed:
            results = self._evaluate(state)
        while not self._stop.reached() and self.step < self._config.total_steps:
            state = self._step(state, self._next_batch())
            if self._due(self._config.eval_every):
                results = self._evaluate(state)
            if self._due(self._config.checkpoint_every):
                self._save(state)
        if self._stop.signal_name:
            self._writers.say(f"{self._stop.signal_name}: stopping at step {self.step}")
        if self._last_saved != self.step:
            self._save(state)
        return state, results

    def _due(self, every: int) -> bool:
        return self.step == self._config.total_steps or (every > 0 and self.step % every == 0)

    def _doing(self) -> str:
        return f"process {jax.process_index()}, last step started: {self.step}"

    def _next_batch(self) -> Placed:
        before = self._parts.batches.waited
        try:
            placed = next(self._parts.batches)
        except StopIteration:
            raise RunError(
                f"the training data ended after {self.step} of {self._config.total_steps} steps: "
                "repeat the data set or lower total_steps"
            ) from None
        self._log.waited(self._parts.batches.waited - before)
        return placed

    def _step(self, state: TrainState, placed: Placed) -> TrainState:
        if not self._steps.ready(placed.batch):
            self._compile(state, placed)
        self._profile.step(self._log.flush)
        step = self.step + 1
        logged = step in (1, self._config.total_steps) or step % self._config.log_every == 0
        traced = jax.profiler.StepTraceAnnotation("train", step_num=step)
        with traced, self._memory_explained(placed, "running"):
            state, *outputs = self._steps(state, placed.batch)
            self._log.started(tuple(outputs), placed, self._steps.flops(placed.batch), logged)
        self._position = placed.position
        self._watchdog.beat()
        if logged:
            self._look_after(state)
        return state

    def _look_after(self, state: TrainState) -> None:
        """Notices what goes on beside the steps: saves that failed, a lock that was taken away."""
        if self._parts.lock.lost:
            raise RunError(
                f"{self._parts.lock.lost}: another run may be writing here; this one ends"
            )
        with jax.transfer_guard("allow"):
            reason = self._saved.poll()
        if reason:
            self._retry(state, reason)

    def _compile(self, state: TrainState, placed: Placed) -> None:
        self._log.flush()
        before = self._steps.seconds
        again = self._steps.changed(placed.batch)
        with self._clock.pause("compile"), self._memory_explained(placed, "compiling"):
            self._steps.prepare(state, placed.batch)
        flops = self._steps.flops(placed.batch)
        self._writers.say(
            f"compiled the step in {self._steps.seconds - before:.1f} s, {flops / 1e9:,.4g} GFLOP, "
            f"for batches with {shapes(placed.batch)}{again and f' (other than before: {again})'}"
        )
        self._watchdog.beat()

    @contextlib.contextmanager
    def _memory_explained(self, placed: Placed, doing: str) -> Iterator[None]:
        """Says of a device without memory enough what takes how much, and what may help."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            parts = self._parts
            text = memory.explain(error, parts.plan, placed.batch, parts.config, doing)
            if text is None:
                raise
            raise RunError(text) from error

    def _evaluate(self, state: TrainState) -> Results:
        """Evaluates, unless the run is asked to stop meanwhile: then an evaluation is owed."""
        self._log.flush()
        keep_going = self._config.on_evaluation_error == "continue"
        try:
            with self._clock.pause("evaluate"):
                results = self._evaluation.run(
                    state.params, self._interrupted, self._writers.say if keep_going else None
                )
        except RunError:
            self._note_owed(True)
            if self._last_saved != self.step:
                self._save(state)  # training itself is sound: only the evaluation is owed
            self._finish_saving(state)
            raise
        self._note_owed(results is None)
        for name, values in (results or {}).items():
            self._writers.write(self.step, name, values | {"seconds": self._clock.seconds})
        self._metric = self.step, _best_value(self._config, results or {})
        return results or {}

    def _note_owed(self, owed: bool) -> None:
        """Keeps in the workdir that the evaluation of this step is still to be made, or is not."""
        note, before, self._owed = self._parts.workdir / OWED, self._owed, owed
        if jax.process_index() == 0 and owed:
            note.write_text(str(self.step))
        elif jax.process_index() == 0 and before:
            note.unlink(missing_ok=True)

    def _interrupted(self) -> bool:
        self._watchdog.beat()
        return self._stop.reached()

    def _save(self, state: TrainState) -> None:
        """Saves what the steps so far have made, after their numbers are checked and on disk."""
        self._log.flush()
        self._writers.flush()
        with jax.transfer_guard("allow"):
            position = shared_position(self._position)
        progress = {
            "position": position,
            "fingerprint": self._parts.fingerprint,
            "seconds": self._clock.seconds,
            "pauses": self._clock.pauses,
            "counters": dataclasses.asdict(self._log.counters),
        }
        step, value = self._metric
        with self._clock.pause("save"), jax.transfer_guard("allow"):
            self._saved.save(self.step, state, progress, value if step == self.step else None)
        self._last_saved = self.step
        self._watchdog.beat()

    def _retry(self, state: TrainState, reason: str) -> None:
        self._writers.say(retry_line(reason, self.step))
        self._save(state)

    def _finish_saving(self, state: TrainState) -> None:
        """Waits until the last save is on disk; one that failed is tried again, a few times."""
        while True:
            with self._clock.pause("save"), jax.transfer_guard("allow"):
                reason = self._saved.wait()
            self._watchdog.beat()
            if reason is None:
                return
            self._retry(state, reason)

    def _summary(self, end: str) -> None:
        """One line: where the wall time of all parts of the run went."""
        waited = self._log.counters.waited
        parts = {"steps": max(self._clock.seconds - waited, 0.0), "input": waited}
        parts |= self._clock.pauses
        total = sum(parts.values())
        shares = ", ".join(f"{name} {share / total:.0%}" for name, share in parts.items())
        retries = sum(storage.RETRIES.values()) - self._retries
        again = f", {retries} requests to storage repeated" if retries else ""
        self._writers.say(f"{end} at step {self.step} after {duration(total)} ({shares}){again}")


def _peak(mesh: Mesh) -> float | None:
    """FLOP/s of all devices together, where their kind is known."""
    kinds = {device.device_kind for device in mesh.devices.flat}
    peak = peak_flops(kinds.pop()) if len(kinds) == 1 else None
    return peak * mesh.size if peak else None


def check_best(config: ConfigDict, task: Task) -> None:
    """Checks that `best_metric` can be found.

    Raises:
      UsageError: it names no evaluator of the task.
    """
    names = list(task.evaluators())
    if config.best_metric and config.best_metric.split("/")[0] not in names:
        raise UsageError(f"best_metric={config.best_metric}: no such evaluator; there are {names}")


def _best_value(config: ConfigDict, results: Results) -> float | None:
    """The value of `best_metric`; None where that evaluator gave no result this time."""
    if not config.best_metric:
        return None
    evaluator, metric = config.best_metric.split("/")
    if evaluator in results and metric not in results[evaluator]:
        raise RunError(
            f"best_metric={config.best_metric}: {evaluator} has {sorted(results[evaluator])}"
        )
    return results.get(evaluator, {}).get(metric)
