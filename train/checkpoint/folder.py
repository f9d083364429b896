"""Which steps a folder of checkpoints holds: complete, unfinished or damaged, and their moving.

A step is complete once it has a manifest. While one is written or deleted, `<step>.unfinished`
stands beside it: what a killed run left there may go; any other step without manifest is damage.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping

from etils import epath

from jaxmodels.core import manifest

FROZEN = "frozen"
DAMAGED = "damaged"
_MARK = ".unfinished"
_REASON = ".txt"
_TEMPORARY = ".orbax-checkpoint-tmp"
_AGAIN = ".again"


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which steps stay: the newest `keep`, and the `keep_best` with the best metric.

    Attributes:
      keep: at least 1.
      keep_best: 0 for none.
      metric: its name; values under another name do not count.
      mode: "max" or "min".
    """

    keep: int = 3
    keep_best: int = 0
    metric: str | None = None
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.keep < 1 or self.keep_best < 0 or self.mode not in ("max", "min"):
            raise ValueError(f"{self}: keep >= 1, keep_best >= 0 and mode max or min are accepted")

    def stays(self, metrics: Mapping[int, float | None]) -> set[int]:
        """Returns the steps to keep of {step: metric}; NaN and None are never the best."""
        sign = 1 if self.mode == "max" else -1
        finite = {s: v for s, v in metrics.items() if v is not None and math.isfinite(v)}
        best = sorted(finite, key=lambda step: (sign * finite[step], step), reverse=True)
        return {*sorted(metrics)[-self.keep :], *best[: self.keep_best]}


class Folder:
    """The folder of checkpoints of one run."""

    def __init__(self, root: epath.Path):
        """`root` need not exist before the first save."""
        self.root = root

    def path(self, step: int) -> epath.Path:
        """Returns the folder of one step."""
        return self.root / str(step)

    @property
    def frozen(self) -> epath.Path:
        """The folder of the parameters that no step changes."""
        return self.root / FROZEN

    def entries(self) -> list[int]:
        """Returns every step that has a folder, complete or not, ascending."""
        if not self.root.exists():
            return []
        return sorted(int(path.name) for path in self.root.iterdir() if path.name.isdecimal())

    def steps(self) -> list[int]:
        """Returns the complete steps, ascending."""
        return [step for step in self.entries() if self.complete(step)]

    def complete(self, step: int) -> bool:
        """Returns whether the step has a manifest."""
        return (self.path(step) / manifest.NAME).exists()

    def unfinished(self, step: int) -> bool:
        """Returns whether a killed run was writing or deleting this step."""
        return self._mark(step).exists() and not self.complete(step)

    def place(self, step: int, tries: int) -> epath.Path:
        """Returns where to write `step` after so many failed tries: each has a place of its own.

        Writes of a failed try may still be under way, and must not get into the next one.
        """
        return self.root / f"{step}{_AGAIN}{tries}" if tries else self.path(step)

    def begin(self, step: int) -> None:
        """Marks `step` as being written, after removing what killed or failed runs left."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.sweep()
        if self.path(step).exists():
            self.set_aside(step, "it had no manifest when it was saved again")
        self._mark(step).touch()

    def finish(self, step: int) -> None:
        """Removes the mark: the step is complete."""
        self._mark(step).unlink(missing_ok=True)

    def delete(self, step: int) -> None:
        """Deletes a step; killed half-way, it is unfinished and not damaged."""
        with contextlib.suppress(Exception):  # a full disk must not keep us from making room
            self._mark(step).touch()
        (self.path(step) / manifest.NAME).unlink(missing_ok=True)
        self.path(step).rmtree()
        self.finish(step)

    def sweep(self) -> None:
        """Removes unfinished steps and temporary folders, as far as can be: the next sweep goes on.

        Nothing may be written at the same time.
        """
        for path in list(self.root.iterdir()) if self.root.exists() else ():
            with contextlib.suppress(Exception):
                if _TEMPORARY in path.name or _AGAIN in path.name:
                    path.rmtree(missing_ok=True)
                elif path.name.endswith(_MARK):
                    step = int(path.name.removesuffix(_MARK))
                    if not self.complete(step):
                        self.path(step).rmtree(missing_ok=True)
                    path.unlink(missing_ok=True)

    def set_aside(self, step: int, reason: str) -> epath.Path:
        """Moves a damaged step to `damaged/`, under a name not yet used; returns the new place."""
        place = self.root / DAMAGED
        place.mkdir(parents=True, exist_ok=True)
        target, tries = place / str(step), 0
        while target.exists():
            tries += 1
            target = place / f"{step}.{tries}"
        (place / f"{target.name}{_REASON}").write_text(reason)  # makes the folder in a bucket
        self.path(step).rename(target)
        return target

    def damaged(self) -> dict[str, str]:
        """Returns {name: why} of what was moved aside."""
        place, found = self.root / DAMAGED, {}
        names = sorted(path.name for path in place.iterdir()) if place.exists() else []
        for name in names:
            if not name.endswith(_REASON):
                note = place / f"{name}{_REASON}"
                found[name] = note.read_text() if note.exists() else "damaged"
        return found

    def _mark(self, step: int) -> epath.Path:
        return self.root / f"{step}{_MARK}"
