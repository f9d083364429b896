"""The checkpoints of a run: saved behind the training, proved whole, and read back exactly.

    checkpoints/<step>/{params,training,progress,manifest.json}
    checkpoints/frozen/      parameters that no step changes, written once
    checkpoints/damaged/     steps that turned out to be damaged

A step exists once its manifest does. Every method of `Checkpoints` that several processes call
must be called by all of them, in the same order, from the main thread.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from jaxmodels.core import manifest
from train import distributed, storage
from train.checkpoint import leaves as leaves_lib
from train.checkpoint import reader as reader_lib
from train.checkpoint.folder import Folder, Retention
from train.checkpoint.stored import FOLDER
from train.checkpoint.writer import Metric, Writer
from train.errors import CheckpointError, UsageError
from train.state import Layout, TrainState

Tree = Any
TRIES = 3  # saves in a row that may fail
_BEGUN, _THERE = "begun", "there"
_NOTED = 1.0  # seconds of waiting that are worth a line
_GRACE = 30.0  # seconds that a process which fails gives the others to finish a save
_PATIENCE = 60.0  # seconds of waiting between two lines that say so


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: its step, the state on the mesh, and what this process noted beside it."""

    step: int
    state: TrainState
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, written in the background, at most one at a time."""

    def __init__(
        self,
        workdir: epath.PathLike,
        keep: int = 3,
        keep_best: int = 0,
        best_metric: str | None = None,
        best_mode: str = "max",
        say: Callable[[str], None] = print,
    ):
        """Nothing is written before the first save.

        Args:
          workdir: of the run; local, or remote like gs://bucket/run.
          keep: how many of the newest steps stay.
          keep_best: how many of those with the best metric stay besides.
          best_metric: the name of that metric; noted with each step.
          best_mode: whether the largest is the best, "max", or the smallest, "min".
          say: takes lines for the user; called on process 0 alone, in the main thread.
        """
        self._folder = Folder(storage.absolute(workdir) / FOLDER)
        self._metric, self._told = best_metric, say
        retention = Retention(keep, keep_best, best_metric, best_mode)
        self._writer = Writer(self._folder, retention)
        self._failures = 0
        self._news: tuple[int | None, str] | None = None  # a failure that poll has not told yet

    def steps(self) -> list[int]:
        """Returns the steps that have a manifest, ascending."""
        return self._folder.steps()

    def latest_step(self) -> int | None:
        """Returns the newest step that has a manifest, or None; says nothing of its health."""
        return max(self.steps(), default=None)

    def restore(self, plan: Layout) -> Restored | None:
        """Returns the newest step that is whole, on the mesh of `plan`; None where none was saved.

        Damaged ones are told, and moved to `checkpoints/damaged`; what a killed run had not
        finished is passed over.

        Raises:
          CheckpointError: every step is damaged, or the storage cannot be read.
          UsageError: the leaves differ from those of `plan`: all are compared before one is read.
        """
        step = distributed.first(self._newest_whole)
        if step is None:
            return None
        restored = distributed.together(lambda: self._load(step, plan.abstract))
        self._writer.frozen = manifest.read(self._folder.path(step)).facts["frozen"]
        return restored

    def save(
        self,
        step: int,
        state: TrainState,
        progress: Mapping[str, Any],
        metric: float | None = None,
    ) -> None:
        """Starts to save; returns once `state` may be donated.

        Waits for the save before, where that still runs. What goes wrong is told by `poll`. A
        step that is complete already is not written again.

        Args:
          step: names the checkpoint.
          state: the whole training state.
          progress: JSON values of this process; `position` is its place in the data.
          metric: what the step is ranked by; None and NaN are never the best.

        Raises:
          CheckpointError: this was the third failure in a row.
        """
        text = json.dumps(dict(progress))
        if self._writer.step is not None:
            self._wait_before(step)
        begun = distributed.first(lambda: self._begin(step, state))
        if begun == _THERE:
            return
        if begun != _BEGUN:
            self._fail(step, begun)
            return
        value = metric if metric is not None and math.isfinite(metric) else None
        self._writer.start(step, state, text, Metric(self._metric, value))

    def poll(self) -> str | None:
        """Returns what failed of the saves since the last call, else None; waits for none.

        Raises:
          CheckpointError: this was the third failure in a row.
        """
        if self._writer.step is not None:
            self._settle(*_outcome(*self._writer.state()))
        return self._take_news()

    def wait(self) -> str | None:
        """Waits until everything is on disk; returns and raises as `poll`."""
        self._wait()
        return self._take_news()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for what this process is writing.

        Raises:
          CheckpointError: it failed, nobody was told, and no other error is on its way.
        """
        # After an error the other processes may be gone, and orbax wait for them for long.
        patience = _GRACE if kind is not None and jax.process_count() > 1 else None
        step, (done, error) = self._writer.step, self._writer.state(patience)
        if not done:
            self._say(f"checkpoint {step} was left unfinished")
            return
        if error:
            self._news = (step, error)
        self._writer.done(failed=error is not None)
        self._writer.close()
        self._tell_warnings()
        if self._news and kind is None:
            raise CheckpointError(self._news_line())
        if self._news:
            self._say(self._news_line())

    def _load(self, step: int, plan: TrainState) -> Restored:
        reader_lib.check_state(self._folder, step, plan)
        progress = reader_lib.load_progress(self._folder, step)
        found = reader_lib.load(self._folder, step, leaves_lib.items(plan))
        return Restored(step, leaves_lib.assemble(plan, found), progress)

    def _newest_whole(self) -> int | None:
        """Process 0: the newest step that is whole; moves the damaged ones out of the way."""
        try:
            return self._walk()
        except (CheckpointError, UsageError):
            raise
        except Exception as error:  # clients of remote storage raise types of their own
            reason = manifest.one_line(error)
            raise CheckpointError(f"{self._folder.root} cannot be read: {reason}") from error

    def _walk(self) -> int | None:
        for step in reversed(self._folder.entries()):
            if self._folder.unfinished(step):
                self._say(f"checkpoint {step} was not finished when the run ended: passed over")
                continue
            reason = reader_lib.damage(self._folder, step)
            if reason is None:
                return step
            place = self._folder.set_aside(step, reason)
            self._say(f"checkpoint {step} is damaged: {reason}; moved to {place}")
        damaged = self._folder.damaged()
        if damaged:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
            raise CheckpointError(
                f"{self._folder.root} has no checkpoint that can be used. Damaged: {reasons}. To "
                "start from step 0, give another workdir or remove that folder"
            )
        return None

    def _begin(self, step: int, state: TrainState) -> str:
        """Process 0: makes room for a step; _BEGUN, _THERE, or what the storage answered."""
        try:
            if self._folder.complete(step):
                return _THERE
            new = self._writer.frozen is None and jax.tree.leaves(state.frozen)
            if new and self._folder.steps():
                raise CheckpointError(
                    f"{self._folder.root} holds steps of another start: restore them, or give "
                    "another workdir"
                )
            self._folder.begin(step)
        except CheckpointError:
            raise
        except Exception as error:  # clients of remote storage raise types of their own
            return manifest.one_line(error)
        return _BEGUN

    def _wait_before(self, step: int) -> None:
        """Waits for the save under way, and says how long the training stood."""
        writing, began = self._writer.step, time.monotonic()
        busy = not self._writer.state()[0]
        self._wait()
        seconds = time.monotonic() - began
        if busy and seconds >= _NOTED:
            self._say(
                f"training waited {seconds:.1f} s for checkpoint {writing} to be written before "
                f"saving {step}: the storage is slow, or checkpoint_every small"
            )
        if self._news:
            self._say(retry_line(self._news_line(), step))
            self._news = None

    def _wait(self) -> None:
        """Ends the save under way, on all processes together."""
        began = told = time.monotonic()
        while self._writer.step is not None:
            self._settle(*_outcome(*self._writer.state(1.0)))
            if self._writer.step is not None and time.monotonic() - told > _PATIENCE:
                told = time.monotonic()
                self._say(f"checkpoint {self._writer.step}: {told - began:.0f} s, still writing")

    def _settle(self, done: bool, error: str | None) -> None:
        """Takes note of how the save under way goes, as agreed by all processes."""
        self._tell_warnings()
        if not done:
            return
        step = self._writer.step
        self._writer.done(failed=error is not None)
        if error is None:
            self._failures = 0
        else:
            self._fail(step, error)

    def _fail(self, step: int | None, error: str) -> None:
        self._failures += 1
        self._news = (step, error)
        if self._failures < TRIES:
            return
        self._news = None
        raise CheckpointError(
            f"checkpoint {step} ({self._folder.root}) could not be written, like the "
            f"{TRIES - 1} before it: {error}; {self._last_good()}"
        )

    def _last_good(self) -> str:
        try:
            good = self.latest_step()
        except Exception:
            return "which steps are saved cannot be read either"
        return "no step is saved" if good is None else f"the last good one is {good}"

    def _take_news(self) -> str | None:
        told = self._news_line() if self._news else None
        self._news = None
        return told

    def _news_line(self) -> str:
        step, error = self._news or (None, "")
        return f"checkpoint {step} was not written: {error}"

    def _tell_warnings(self) -> None:
        while self._writer.warnings:
            self._say(self._writer.warnings.pop(0))

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            self._told(text)


def retry_line(failure: str, step: int) -> str:
    """What is said of a save that failed, before `step` is saved in its place."""
    return f"warning: {failure}; saving step {step}"


def _outcome(done: bool, error: str | None) -> tuple[bool, str | None]:
    """Returns (ended, the first error), the same everywhere, of what each process knows."""
    found = distributed.gather([done, error])
    errors = [(index, error) for index, (_, error) in enumerate(found) if error]
    if not errors:
        return all(done for done, _ in found), None
    index, error = errors[0]
    return True, error if len(found) == 1 else f"process {index}: {error}"
