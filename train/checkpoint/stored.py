"""The parameters of a checkpoint, without the rest of a run: found, proved whole, read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxmodels.core import manifest
from train import distributed, storage
from train.checkpoint import leaves as leaves_lib
from train.checkpoint import reader as reader_lib
from train.checkpoint.folder import FROZEN, Folder
from train.errors import CheckpointError, UsageError

Tree = Any
FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """The parameters of a checkpoint whose files are whole, not read yet.

    Attributes:
      folder: the checkpoints of the run.
      step: of the checkpoint.
      items: {item: {path: dtype and shape}} of trained and frozen parameters.
    """

    folder: Folder
    step: int
    items: dict[str, dict[str, str]]

    @property
    def leaves(self) -> dict[str, str]:
        """{path: dtype and shape} of all parameters."""
        return {path: leaf for leaves in self.items.values() for path, leaf in leaves.items()}

    @property
    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: struct} of all parameters."""
        return {path: leaves_lib.struct(text) for path, text in self.leaves.items()}

    @property
    def place(self) -> epath.Path:
        """Folder of the step."""
        return self.folder.path(self.step)

    def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Returns {path: array} of all parameters, as and where `wanted` {path: struct} says."""
        split = {
            item: {path: wanted[path] for path in leaves} for item, leaves in self.items.items()
        }
        found = reader_lib.load(self.folder, self.step, split)
        return {path: leaf for leaves in found.values() for path, leaf in leaves.items()}


def open_params(path: epath.PathLike, step: int | None = None) -> StoredParams:
    """Returns what a run or a single checkpoint holds; see `load_params`.

    Raises:
      UsageError: nothing is there.
      CheckpointError: what is there is damaged.
    """
    root, newest = find(path, step)
    folder = Folder(root)
    itself = storage.absolute(path) == folder.path(newest)
    chosen = itself or step is not None
    step = distributed.first(lambda: _whole(folder, newest, [newest] if chosen else folder.steps()))
    stored = reader_lib.stored_leaves(folder, step)
    return StoredParams(folder, step, {item: stored[item] for item in ("params", FROZEN)})


def load_params(path: epath.PathLike, abstract: Tree, step: int | None = None) -> tuple[Tree, int]:
    """Returns (parameters, their step) of a run or a single checkpoint, placed as `abstract` says.

    Where the newest is damaged, says so and takes the one before, unless `step` is given.

    Args:
      path: a workdir, its folder of checkpoints, or the folder of one step.
      abstract: shape structs with shardings, from `state.abstract_params`.
      step: which one; the newest by default.

    Raises:
      UsageError: nothing is there, or names, shapes or types differ (all are listed).
      CheckpointError: what is there is damaged.
    """
    stored, wanted = open_params(path, step), leaves_lib.named(abstract)
    reader_lib.check_same(stored.leaves, wanted, f"checkpoint {stored.place}")
    return leaves_lib.fill(abstract, stored.load(wanted)), stored.step


def _whole(folder: Folder, newest: int, steps: list[int]) -> int:
    """Process 0: the newest of `steps` whose weights are whole."""
    reasons: list[str] = []
    for step in sorted((s for s in steps if s <= newest), reverse=True):
        reason = reader_lib.damage(folder, step, ("params/",))
        if reason is None:
            for line in reasons:
                print(f"{line}; taking checkpoint {step}", flush=True)
            return step
        reasons.append(f"checkpoint {step} ({folder.path(step)}) is damaged: {reason}")
    raise CheckpointError("; ".join(reasons))


def find(path: epath.PathLike, step: int | None = None) -> tuple[epath.Path, int]:
    """Returns the folder of checkpoints that `path` means, and the step: `step` or the newest.

    Raises:
      UsageError: no checkpoint is there, or not of that step.
    """
    path = storage.absolute(path)
    if path.name.isdecimal() and (path / manifest.NAME).exists():
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).exists() else path
    steps = Folder(folder).steps()
    if not steps:
        raise UsageError(f"{path}: no checkpoint there (wanted: the --workdir of a run)")
    if step is not None and step not in steps:
        raise UsageError(f"{path}: no checkpoint of step {step}; there are {steps}")
    return folder, max(steps) if step is None else step
