"""Reads checkpoints: proves that the files are whole, compares the leaves, then loads them."""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxmodels.core import manifest
from jaxmodels.core.manifest import Manifest
from train import storage
from train.checkpoint import arrays as arrays_lib
from train.checkpoint import leaves as leaves_lib
from train.checkpoint.folder import FROZEN, Folder
from train.errors import CheckpointError, UsageError
from train.state import TrainState

Tree = Any
_SHOWN = 10  # differing leaves listed


def failure(step: int, place: epath.Path, reason: str) -> CheckpointError:
    """Returns the error of one step, in one line."""
    return CheckpointError(f"checkpoint {step} ({place}): {reason}")


def damage(folder: Folder, step: int, under: tuple[str, ...] = ("",)) -> str | None:
    """Returns what is wrong with the files of a step that start as one of `under`, or None.

    Raises:
      CheckpointError: the storage cannot be read, or the frozen parameters are damaged.
    """
    place = folder.path(step)
    try:
        found = storage.retry(lambda: manifest.read(place))
        storage.retry(lambda: manifest.verify(place, found, under))
    except manifest.Damaged as error:
        return str(error)
    except manifest.NewerFormat as error:
        raise UsageError(str(error)) from error
    except Exception as error:  # clients of remote storage raise types of their own
        raise failure(step, place, f"cannot be read: {manifest.one_line(error)}") from error
    _check_frozen(folder, step, found)
    return None


def _check_frozen(folder: Folder, step: int, found: Manifest) -> None:
    """The frozen parameters belong to every step: without them none can be used, or moved."""
    if found.facts["frozen"] is None:
        return
    reason = ""
    try:
        frozen = storage.retry(lambda: manifest.read(folder.frozen))
        storage.retry(lambda: manifest.verify(folder.frozen, frozen))
        if frozen.digest != found.facts["frozen"]:
            reason = "these are not the ones that the step was trained with"
    except manifest.Damaged as error:
        reason = str(error)
    except manifest.NewerFormat as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        reason = f"cannot be read: {manifest.one_line(error)}"
    if reason:
        raise failure(
            step,
            folder.frozen,
            f"the frozen parameters, which every step needs, are damaged: {reason}; put back a "
            "copy of that folder, or start in another workdir",
        )


def load(folder: Folder, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {item: {path: leaf}} of a step, as and where `wanted` {item: {path: struct}} says.

    Raises:
      UsageError: stored leaves differ from the wanted ones.
      CheckpointError: orbax cannot read them.
    """
    place = folder.path(step)
    described = _described(folder, step, wanted.keys())
    found = {}
    for item, leaves in wanted.items():
        where = folder.frozen if item == FROZEN else place / item
        packed = described[item]["packed"]
        try:
            tree = arrays_lib.read(where, leaves_lib.stored_tree(leaves, packed))
            found[item] = leaves_lib.unpack(tree, leaves, packed)
        except Exception as error:
            reason = f"{item} cannot be read: {manifest.one_line(error)}"
            raise failure(step, place, reason) from error
    return found


def _described(folder: Folder, step: int, items: Any) -> dict[str, Any]:
    try:
        facts = manifest.read(folder.path(step)).facts
        described = dict(facts["items"])
        if FROZEN in items and facts["frozen"] is not None:
            described |= manifest.read(folder.frozen).facts["items"]
    except manifest.NewerFormat as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        raise failure(step, folder.path(step), manifest.one_line(error)) from error
    return {FROZEN: {"leaves": {}, "packed": []}} | described


def stored_leaves(folder: Folder, step: int) -> dict[str, dict[str, str]]:
    """Returns {item: {path: dtype and shape}} of all that a step holds, without reading arrays."""
    described = _described(folder, step, (FROZEN,))
    return {item: entry["leaves"] for item, entry in described.items()}


def check_state(folder: Folder, step: int, plan: TrainState) -> None:
    """Compares the leaves of a step with those of `plan`.

    Raises:
      UsageError: they differ; every kind of difference is listed by path.
    """
    wanted, stored = leaves_lib.items(plan), stored_leaves(folder, step)
    what = f"checkpoint {step} ({folder.path(step)})"
    every = {**stored["params"], **stored[FROZEN]}
    check_same(every, {**wanted["params"], **wanted[FROZEN]}, f"{what}, params")
    moved = [f"{path} was frozen" for path in sorted(stored[FROZEN].keys() & wanted["params"])]
    moved += [f"{path} was trained" for path in sorted(stored["params"].keys() & wanted[FROZEN])]
    _refuse(moved, f"{what}, params")
    check_same(stored["training"], wanted["training"], f"{what}, training")


def check_same(stored: Mapping[str, str], wanted: Mapping[str, Any], what: str) -> None:
    """Compares stored leaves with wanted ones by path, shape and dtype.

    Args:
      stored: {path: as `leaves_lib.describe` says}.
      wanted: {path: something with shape and dtype}.
      what: names the stored ones in the message.

    Raises:
      UsageError: they differ; every kind of difference is listed.
    """
    described = {path: leaves_lib.describe(leaf) for path, leaf in wanted.items()}
    lines = [f"missing {path} {described[path]}" for path in sorted(described.keys() - stored)]
    lines += [f"unexpected {path} {stored[path]}" for path in sorted(stored.keys() - described)]
    lines += [
        f"{path} is {stored[path]}, wanted {leaf}"
        for path, leaf in sorted(described.items())
        if stored.get(path, leaf) != leaf
    ]
    _refuse(lines, what)


def _refuse(lines: list[str], what: str) -> None:
    if not lines:
        return
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise UsageError(
        f"{what} is of another model or optimiser: {'; '.join(lines[:_SHOWN])}{more}; continue "
        "with the settings it was saved with, or begin in another workdir with "
        "--config.warm_start=<this workdir>, which takes the weights alone"
    )


def load_progress(folder: Folder, step: int) -> dict[str, Any]:
    """Returns what this process saved beside the arrays of `step`.

    Raises:
      UsageError: another number of processes saved it, each at a place of its own in the data.
    """
    place = folder.path(step)
    own = arrays_lib.progress_file(jax.process_index(), jax.process_count())
    try:
        files = manifest.read(place).files
        names = [n for n in files if n.startswith(f"{arrays_lib.PROGRESS}/process_")]
        if own in names:
            return json.loads((place / own).read_text())
        every = [json.loads((place / name).read_text()) for name in sorted(names)]
    except Exception as error:
        raise failure(step, place, f"progress: {manifest.one_line(error)}") from error
    if any(one.get("position") != every[0].get("position") for one in every):
        raise UsageError(
            f"checkpoint {step} ({place}) was saved by {len(every)} processes, each at its own "
            f"place in the data; it cannot be continued by {jax.process_count()}"
        )
    first = arrays_lib.progress_file(0, len(every))
    return every[sorted(names).index(first)]
