"""A run's folder and the config kept in it: the whole truth of a run, besides its checkpoints."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs import fields as config_fields
from configs.fields import COMMON, Field, Fields
from train.errors import UsageError

CONFIG = "config.json"


def changes(workdir: epath.PathLike, config: ConfigDict, fields: Fields) -> list[str]:
    """Returns what differs between `config` and the one saved in the folder, if there is one.

    Args:
      workdir: the folder of the run, new or of the run to continue; made where absent.
      config: what is asked for now.
      fields: its fields; those with `may_change` may differ from the saved ones.

    Raises:
      UsageError: the folder cannot be made, or holds a run of another config.
    """
    folder = epath.Path(workdir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be made: {error}") from error
    if not (folder / CONFIG).exists():
        return []
    before, now = _read(folder / CONFIG), config_fields.flat(config)
    lines = _differences(before, now)
    refused = [line for name, line in lines.items() if not _may_change(name, fields, before, now)]
    if refused:
        raise UsageError(
            f"--workdir={workdir} holds a run of another config: {'; '.join(refused)} "
            f"(as saved -> as asked for); give a new --workdir, or the saved values"
        )
    return list(lines.values())


def save_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes `config.json` whole or not at all.

    Raises:
      UsageError: the folder cannot be written.
    """
    path = epath.Path(workdir).expanduser() / CONFIG
    part = path.with_name(CONFIG + ".part")
    try:
        part.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error}") from error


def load_config(workdir: epath.PathLike) -> tuple[ConfigDict, Fields]:
    """Returns the config saved in a run's folder, and fields that check further overrides of it.

    Raises:
      UsageError: no config is there, or it cannot be read.
    """
    path = epath.Path(workdir).expanduser() / CONFIG
    if not path.exists():
        raise UsageError(f"--workdir={workdir}: no {CONFIG} there (wanted: the folder of a run)")
    values = _read(path)
    fields = {name: _field(name, value) for name, value in values.items()}
    return config_fields.build(fields, values), fields


def _field(name: str, value: Any) -> Field:
    """The common field of that name, or one that accepts what has the saved value's type."""
    return COMMON.get(name) or Field(value, "a setting of the method")


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        values = config_fields.flat(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path}: not the config of a run ({error})") from error
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    absent = "absent"
    return {
        name: f"{name} {before.get(name, absent)} -> {now.get(name, absent)}"
        for name in sorted(before.keys() | now.keys())
        if (name in before) != (name in now) or before.get(name) != now.get(name)
    }


def _may_change(
    name: str, fields: Fields, before: Mapping[str, Any], now: Mapping[str, Any]
) -> bool:
    if name == "total_steps" and now.get(name, 0) < before.get(name, 0):
        return False
    return name in fields and fields[name].may_change
