"""Reads command lines: flags by absl, `--config.a.b=v` by the fields' checks, one line an error.

Nothing here imports jax: a mistyped command is answered before any device is touched.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import ConfigDict

from configs import fields as config_fields
from configs import names
from configs.fields import Fields
from configs.names import FieldError
from train.errors import RunError, UsageError
from train.redact import redact

_OVERRIDE = re.compile(r"--?config\.(?P<name>[^=]+)(=(?P<value>.*))?", re.DOTALL)
_ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command: `default` False makes it a switch, None takes a string."""

    name: str
    meaning: str
    default: bool | None = None
    required: bool = False


# How the processes of one run find one another; `train.distributed` says when none is needed.
DISTRIBUTED = (
    Flag(
        "coordinator_address", "several processes: HOST:PORT of the first one, where none is found"
    ),
    Flag("num_processes", "several processes: how many"),
    Flag("process_id", "several processes: the number of this one, from 0"),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command line asked for: the flags by name, and the overrides of the config as text."""

    flags: Mapping[str, Any]
    overrides: Mapping[str, str]


def parse(argv: Sequence[str], flags: Sequence[Flag], usage: str) -> Command:
    """Reads a command line (without the program's name).

    Prints the help and leaves with 0 on `--help`.

    Raises:
      UsageError: unknown flag, missing value, missing required flag, stray argument.
    """
    overrides, rest = _split_overrides(argv)
    values = absl_flags.FlagValues()
    for flag in (*flags, Flag("help", "show this text", False)):
        define = absl_flags.DEFINE_boolean if flag.default is False else absl_flags.DEFINE_string
        define(flag.name, flag.default, flag.meaning, flag_values=values)
    try:
        stray = values(["", *rest])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, [flag.name for flag in flags]) from None
    except absl_flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from None
    if values["help"].value:
        print(_help(flags, usage))
        raise SystemExit(0)
    if stray:
        raise UsageError(f"unexpected argument {stray[0]!r}: flags are given as --name=value")
    given = {flag.name: values[flag.name].value for flag in flags}
    for flag in flags:
        if flag.required and not given[flag.name]:
            raise UsageError(f"--{flag.name} is missing: {flag.meaning}")
    return Command(given, overrides)


def whole_number(name: str, text: str | None) -> int | None:
    """Returns the value of a flag that takes a number >= 0, or None where it was not given.

    Raises:
      UsageError: the text is something else.
    """
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise UsageError(f"--{name}={text}: accepted is a whole number >= 0")


def _split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes `--config.a.b=v` and `--config.a.b v` out of the command line; the last one wins."""
    overrides: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        value = match["value"]
        if value is None:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UsageError(f"{word} has no value: write {word}=VALUE")
        overrides[match["name"]] = value
    return overrides, rest


def _unknown_flag(name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"nearest: --{', --'.join(near)}" if near else f"known: --{', --'.join(known)}"
    return UsageError(f"unknown flag --{name}; {hint}; settings are given as --config.NAME=VALUE")


def _help(flags: Sequence[Flag], usage: str) -> str:
    width = max(len("--config.NAME=VALUE"), *(len(flag.name) + 2 for flag in flags)) + 2
    lines = [f"usage: {usage}", ""]
    lines += [f"  {'--' + flag.name:<{width}}{flag.meaning}" for flag in flags]
    lines.append(f"  {'--config.NAME=VALUE':<{width}}another value for a field of the config")
    return "\n".join(lines)


def read_config(spec: str, overrides: Mapping[str, str]) -> tuple[ConfigDict, Fields]:
    """Returns the config of `path.py:preset` with overrides applied, and its fields.

    The path is taken from the working directory, else from the folder that holds this package. A
    `check(config, names of overrides)` of the file refuses what does not go together.

    Raises:
      UsageError: no such file, preset or field; a value that a field does not take.
    """
    path, _, preset = spec.partition(":")
    module = _import_config(path)
    for needed in ("FIELDS", "get_config"):
        if not hasattr(module, needed):
            raise UsageError(f"--config={path}: the file defines no {needed}")
    fields: Fields = module.FIELDS
    try:
        if preset and hasattr(module, "PRESETS") and preset not in module.PRESETS:
            raise names.unknown("preset", preset, module.PRESETS)
        config = module.get_config(preset) if preset else module.get_config()
    except FieldError as error:
        raise UsageError(f"--config={spec}: {error}") from None
    config = override(config, fields, overrides)
    try:
        getattr(module, "check", lambda *_: None)(config, overrides)
    except FieldError as error:
        raise UsageError(str(error)) from None
    return config, fields


def override(config: ConfigDict, fields: Fields, overrides: Mapping[str, str]) -> ConfigDict:
    """Returns `config` with the text values of `overrides` in place, all checked.

    Raises:
      UsageError: no such field, a value it does not take, or sizes that do not fit together.
    """
    values = config_fields.flat(config)
    try:
        for name, text in overrides.items():
            if name not in fields:
                raise names.unknown("field", f"config.{name}", [f"config.{n}" for n in fields])
            values[name] = fields[name].parse(name, text)
        config = config_fields.build(fields, values)
    except FieldError as error:
        raise UsageError(str(error)) from None
    check_sizes(
        config, config.mesh.node * config.mesh.device if min(config.mesh.values()) > 0 else 1
    )
    return config


def check_sizes(config: ConfigDict, devices: int) -> None:
    """Checks the numbers that must fit one another.

    Args:
      config: holds the common fields.
      devices: devices of the mesh; 1 where that is not known yet.

    Raises:
      UsageError: the batch does not split evenly; the warm-up is longer than the run.
    """
    parts = config.micro_batches * devices
    if config.batch_size % parts:
        below = config.batch_size - config.batch_size % parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        raise UsageError(
            f"batch_size={config.batch_size} does not split into micro_batches="
            f"{config.micro_batches} x {devices} devices; nearest: {nearest}"
        )
    if config.keep_best and config.best_metric is None:
        raise UsageError(f"keep_best={config.keep_best} needs best_metric=EVALUATOR/METRIC")
    if config.optimizer.warmup_steps > config.total_steps:
        raise UsageError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}: "
            f"accepted is at most total_steps={config.total_steps}"
        )


def _import_config(path: str) -> ModuleType:
    """Runs a config file under a name of its own, so that it shadows no other module."""
    places = [pathlib.Path(path).expanduser(), _ROOT / path]
    found = next((place.resolve() for place in places if place.is_file()), None)
    if found is None:
        known = sorted(
            p.name
            for p in (_ROOT / "configs").glob("*.py")
            if p.stem not in ("__init__", "fields", "names")
        )
        near = difflib.get_close_matches(pathlib.Path(path).name, known, n=3) or known
        hint = f"; nearest: {', '.join('configs/' + name for name in near)}" if near else ""
        raise UsageError(f"--config={path}: no such file{hint} (written as path.py:preset)")
    name = f"config_{found.stem}_{hashlib.sha1(str(found).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, found)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config={path}: not a Python file (written as path.py:preset)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--config={path}: the file cannot be read: {reason}") from error
    return module


def describe(config: ConfigDict, fields: Fields) -> str:
    """Returns the table of `--print_config`: field, type, value, default and meaning."""
    values = config_fields.flat(config)
    rows = [("field", "type", "value", "default", "meaning")]
    for name, field in fields.items():
        accepted = f" [{field.accepted}]" if field.choices else ""
        shown = _shown(values[name]), _shown(field.default)
        rows.append((name, field.type_name, *shown, field.meaning + accepted))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, (*widths, 0), strict=True)) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _shown(value: object) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else str(value)
        if value != ""
        else "''"
    )


def start_processes(command: Command, config: ConfigDict | None = None) -> None:
    """Joins the other processes of this run, where the flags or the environment speak of any.

    Args:
      command: holds the flags of `DISTRIBUTED`.
      config: gives the times to wait; None takes their defaults.

    Raises:
      UsageError: the flags contradict one another.
      RunError: the others were not found in time.
    """
    from train import distributed  # imports jax: only once the command line is known to be good

    times = (config or config_fields.build(config_fields.COMMON, {"method": "any"})).distributed
    distributed.initialize(
        command.flags["coordinator_address"],
        whole_number("num_processes", command.flags["num_processes"]),
        whole_number("process_id", command.flags["process_id"]),
        times.timeout_seconds,
        times.heartbeat_seconds,
    )


def run(command: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command on this process's arguments and leaves.

    Status 0: done; 1: failed; 2: asked for wrongly, nothing was compiled; 143: stopped by a signal,
    what was trained is saved. A failure that has a name is one line; any other keeps Python's
    traceback.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)  # training has a handler of its own, `train.signals`
    try:
        command(sys.argv[1:])
        status = 0
    except SystemExit as leaving:
        status = leaving.code
    except (UsageError, RunError) as error:
        status = _say_error(error)
    except Exception as error:
        explained = _explained(error)
        status = _say_error(explained) if explained else _say_traceback()
    try:
        if "jax" in sys.modules:
            from train import distributed

            distributed.leave(status)
        raise SystemExit(status)
    finally:  # Python drops its handlers while it ends: a signal then would change the status
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _stopped(number: int, _: FrameType | None) -> None:
    """Leaves at once, where there is nothing to finish: before the training, and after it."""
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + signal.SIGTERM)


def _say_error(error: Exception) -> int:
    """Prints an error with a name as one line; returns the exit status."""
    print("error: " + redact(" ".join(str(error).split())), file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _say_traceback() -> int:
    print(redact(traceback.format_exc()), file=sys.stderr, end="")
    return 1


def _explained(error: Exception) -> RunError | None:
    """What an error of jax means, where that is known: a process that has gone."""
    if "jax" not in sys.modules:
        return None
    from train import distributed

    return distributed.lost_peer(error)
