"""Writes checkpoints behind the training: orbax the arrays, then a thread the proof and the order.

A save passes through four stages, and a kill in any of them leaves every earlier step usable:
marked unfinished; arrays in a temporary folder; arrays in place; manifest written. Only then are
old steps deleted.
"""

import collections
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxmodels.core import manifest
from train.checkpoint import leaves as leaves_lib
from train.checkpoint.arrays import ArrayWriter
from train.checkpoint.folder import FROZEN, Folder, Retention
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a step is ranked by: a name and a value, None where it was not measured."""

    name: str | None = None
    value: float | None = None


@dataclasses.dataclass
class _Job:
    """One save under way, and how it went."""

    step: int
    place: epath.Path
    facts: dict[str, Any]
    frozen_facts: dict[str, Any] | None = None
    thread: threading.Thread | None = None
    error: str | None = None
    frozen: str | None = None
    given_up: bool = False


class Writer:
    """Saves one state after another, each in the background; the caller sees to their order."""

    def __init__(self, folder: Folder, retention: Retention):
        """Writes below `folder`; process 0 writes manifests, and deletes as `retention` says."""
        self._folder, self._retention = folder, retention
        self._arrays: ArrayWriter | None = None
        self._writers = 0
        self._tries: collections.Counter[int] = collections.Counter()  # failed, by step
        self._job: _Job | None = None
        self._metrics: dict[int, float | None] = {}
        self.frozen: str | None = None  # digest of the frozen parameters in the folder
        self.warnings: list[str] = []

    @property
    def step(self) -> int | None:
        """The step being saved, None between saves."""
        return self._job.step if self._job else None

    def start(self, step: int, state: TrainState, progress: str, metric: Metric) -> None:
        """Starts to save `state`, which may be donated afterwards; `state` tells what went wrong.

        Args:
          step: names the checkpoint.
          state: the whole training state.
          progress: JSON text of this process.
          metric: what the step is ranked by.
        """
        items = leaves_lib.items(state)
        frozen = items.pop(FROZEN)
        if frozen and self.frozen is None:
            items[FROZEN] = frozen
        facts = {"step": step, "metric": dataclasses.asdict(metric)}
        place = self._folder.place(step, self._tries[step])
        job = self._job = _Job(step, place, facts, frozen=self.frozen)
        try:
            trees, described = _described(items)
            job.frozen_facts = described.pop(FROZEN, None)
            job.facts["items"] = described
            arrays = self._arrays = self._arrays or self._new_arrays()
            arrays.start(place, trees, progress)
        except Exception as error:
            job.error = manifest.one_line(error)
            return
        job.thread = threading.Thread(
            target=self._finish, args=(job, arrays), name="checkpoint", daemon=True
        )
        job.thread.start()

    def state(self, seconds: float | None = 0.0) -> tuple[bool, str | None]:
        """Returns (whether this process has finished, its error), after `seconds` at most."""
        if self._job is None:
            return True, None
        if self._job.thread is None:
            return True, self._job.error
        self._job.thread.join(seconds)
        return not self._job.thread.is_alive(), self._job.error

    def done(self, failed: bool) -> None:
        """Ends the save under way, as all processes have agreed that it went."""
        job, self._job = self._job, None
        if failed:  # orbax may still wait for the other processes: leave it to its time-out
            self._arrays = None
        if job and failed:
            job.given_up = True
            self._tries[job.step] += 1
        elif job:
            self.frozen = job.frozen

    def close(self) -> None:
        """Releases orbax; nothing may be under way."""
        if self._arrays is not None:
            self._arrays.close()
        self._arrays = None

    def _new_arrays(self) -> ArrayWriter:
        self._writers += 1
        return ArrayWriter(f"writer{self._writers}")

    def _finish(self, job: _Job, arrays: ArrayWriter) -> None:
        """In the background: waits for orbax, then makes the step count."""
        try:
            arrays.join()
            if jax.process_index() == 0 and not job.given_up:
                self._seal(job)
            elif job.frozen_facts is not None:
                job.frozen = "written by process 0"
        except BaseException as error:
            job.error = manifest.one_line(error)

    def _seal(self, job: _Job) -> None:
        place = self._folder.path(job.step)
        if job.place != place:
            job.place.rename(place)
        if job.frozen_facts is not None:
            job.frozen = self._seal_frozen(place, job.frozen_facts)
        manifest.write(place, job.facts | {"frozen": job.frozen})
        self._folder.finish(job.step)
        self._metrics[job.step] = _value(job.facts, self._retention)
        self._prune()

    def _seal_frozen(self, place: epath.Path, facts: dict[str, Any]) -> str:
        """Moves the frozen parameters out of the first step that was saved with them."""
        self._folder.frozen.rmtree(missing_ok=True)  # of a start that was killed: no step uses it
        if (place / FROZEN).exists():
            (place / FROZEN).rename(self._folder.frozen)
        else:  # none of them has an element
            self._folder.frozen.mkdir()
        return manifest.write(self._folder.frozen, {"items": {FROZEN: facts}}).digest

    def _prune(self) -> None:
        steps = self._folder.steps()
        for step in steps:
            if step not in self._metrics:
                self._metrics[step] = self._stored_metric(step)
        metrics = {step: self._metrics[step] for step in steps}
        for step in sorted(metrics.keys() - self._retention.stays(metrics)):
            try:
                self._folder.delete(step)
            except Exception as error:  # of the storage; the step itself is saved
                reason = manifest.one_line(error)
                self.warnings.append(f"checkpoint {step} could not be deleted: {reason}")

    def _stored_metric(self, step: int) -> float | None:
        if not self._retention.keep_best:
            return None
        try:
            return _value(manifest.read(self._folder.path(step)).facts, self._retention)
        except Exception:  # it is then no candidate for the best
            return None


def _described(items: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({item: tree for orbax}, {item: what the manifest says of its leaves})."""
    trees, facts = {}, {}
    for name, leaves in items.items():
        trees[name], packed = leaves_lib.pack(leaves)
        described = {path: leaves_lib.describe(leaf) for path, leaf in leaves.items()}
        facts[name] = {"leaves": described, "packed": packed}
    return trees, facts


def _value(facts: Mapping[str, Any], retention: Retention) -> float | None:
    metric = facts["metric"]
    return metric["value"] if metric["name"] == retention.metric else None
