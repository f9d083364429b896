"""A run's folder and the config kept in it: the whole truth of a run, besides its checkpoints."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs import fields as config_fields
from configs.fields import COMMON, Field, Fields
from train import storage
from train.errors import UsageError
from train.redact import redact_values

CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"


def changes(workdir: epath.PathLike, config: ConfigDict, fields: Fields) -> list[str]:
    """Returns what differs between `config` and the one saved in the folder, if there is one.

    Args:
      workdir: the folder of the run, new or of the run to continue; made where absent.
      config: what is asked for now.
      fields: its fields; those with `may_change` may differ from the saved ones. A field that
        the saved config does not have yet had its default.

    Raises:
      UsageError: the folder cannot be made, holds a run of another config, or its config is
        damaged.
    """
    place = storage.folder(workdir)
    try:
        if not storage.is_remote(place):
            place.mkdir(parents=True, exist_ok=True)
        before = _read(place / CONFIG)
    except FileNotFoundError:
        return _without_config(place)
    except OSError as error:
        raise UsageError(
            f"--workdir={workdir} cannot be used: {storage.describe(error)}"
        ) from error
    now = _plain(redact_values(config_fields.flat(config)))
    before = {name: field.default for name, field in fields.items() if name in now} | before
    lines = _differences(before, now)
    refused = [line for name, line in lines.items() if not _may_change(name, fields, before, now)]
    if refused:
        raise UsageError(
            f"--workdir={workdir} holds a run of another config: {'; '.join(refused)} "
            f"(as saved -> as asked for); give a new --workdir, or the saved values"
        )
    if "total_steps" in lines and config.optimizer.schedule != "constant":
        lines["total_steps"] += _new_schedule(config, before["total_steps"])
    return list(lines.values())


def save_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes `config.json` whole or not at all, without secrets; an equal one is left as it is.

    Raises:
      UsageError: the folder cannot be written.
    """
    path = storage.folder(workdir) / CONFIG
    text = json.dumps(redact_values(config.to_dict()), indent=2) + "\n"
    try:
        if path.exists() and path.read_text() == text:
            return
        storage.write(path, text)
    except OSError as error:
        raise UsageError(
            f"--workdir={workdir} cannot be written: {storage.describe(error)}"
        ) from error


def load_config(workdir: epath.PathLike) -> tuple[ConfigDict, Fields]:
    """Returns the config saved in a run's folder, and fields that check further overrides of it.

    Common fields that are newer than the folder have their defaults.

    Raises:
      UsageError: no config is there, or it cannot be read.
    """
    path = storage.folder(workdir) / CONFIG
    try:
        values = _read(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UsageError(f"{path} cannot be read: {storage.describe(error)}") from error
        raise UsageError(
            f"--workdir={workdir}: no {CONFIG} there (wanted: the folder of a run)"
        ) from None
    fields = COMMON | {name: _field(name, value) for name, value in values.items()}
    try:
        return config_fields.build(fields, values), fields
    except config_fields.FieldError as error:
        raise UsageError(f"{path}: {error}") from error


def _field(name: str, value: Any) -> Field:
    """The common field of that name, or one that accepts what has the saved value's type."""
    return COMMON.get(name) or Field(value, "a setting of the method")


def _read(path: epath.Path) -> dict[str, Any]:
    """The values by dotted name; OSError where the file is absent or cannot be read."""
    text = path.read_bytes()
    try:
        return _plain(config_fields.flat(json.loads(text)))
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged, not the config of a run ({error}): put a good copy there, "
            f"or give a new --workdir"
        ) from error


def _without_config(place: epath.Path) -> list[str]:
    """A new folder has nothing to compare with; one with checkpoints has lost it."""
    if not (place / _CHECKPOINTS).exists() or not any((place / _CHECKPOINTS).iterdir()):
        return []
    return [f"{CONFIG} is gone: the settings of the checkpoints there cannot be compared"]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{field: `field before -> now`}; an option of an older release that was not set is no loss."""
    absent = "absent"
    return {
        name: f"{name} {before.get(name, absent)} -> {now.get(name, absent)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) or (name in now and name not in before)
    }


def _may_change(
    name: str, fields: Fields, before: Mapping[str, Any], now: Mapping[str, Any]
) -> bool:
    if name == "total_steps" and now.get(name, 0) < before.get(name, 0):
        return False
    return name in fields and fields[name].may_change


def _new_schedule(config: ConfigDict, end: int) -> str:
    """What more steps do to the learning rate: its decay is stretched, at once."""
    from train.optimizer import make_schedule  # imports jax, which few callers need

    shorter = ConfigDict(config.to_dict())
    shorter.total_steps = end
    before, now = (float(make_schedule(c)(end)) for c in (shorter, config))
    return (
        f" (the {config.optimizer.schedule} schedule now ends there: "
        f"the learning rate at step {end} is {now:.3g}, it was to be {before:.3g})"
    )
