"""Typed configuration fields: meaning, accepted values, and those that every preset has.

A method's file in `configs/` reads

    FIELDS = COMMON | {"model.num_layers": Field(12, "layers of the encoder", positive)}
    PRESETS = {"quickstart": {"method": "vcc", "model.num_layers": 2}}

    def get_config(name: str = "quickstart") -> ConfigDict:
        return preset(FIELDS, PRESETS, name)

and every value, from a preset or from the command line, passes through the same checks.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.names import FieldError, nearest, unknown

Fields = Mapping[str, "Field"]
_NONE = ("none", "null")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_KINDS = (int, float, bool, str, tuple)


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on a value, and the words that say which values are accepted."""

    accepted: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Check:
    """Accepts numbers in [low, high]."""
    return Check(f"{low} to {high}", lambda value: low <= value <= high)


def at_least(low: float) -> Check:
    """Accepts numbers >= low."""
    return Check(f">= {low}", lambda value: value >= low)


def one_of(*accepted: Any) -> Check:
    """Accepts the values listed."""
    return Check(" | ".join(map(str, accepted)), lambda value: value in accepted)


def each(check: Check) -> Check:
    """Accepts tuples all of whose elements satisfy `check`."""
    return Check(f"each: {check.accepted}", lambda values: all(map(check.holds, values)))


def matching(pattern: str, accepted: str) -> Check:
    """Accepts strings that match the regular expression as a whole."""
    return Check(accepted, lambda value: re.fullmatch(pattern, value) is not None)


positive = Check("> 0", lambda value: value > 0)
non_negative = at_least(0)
fraction = between(0, 1)
below_one = Check("0 to below 1", lambda value: 0 <= value < 1)
inferred_or_positive = Check("-1 (inferred) or > 0", lambda v: v == -1 or v > 0)
method_name = matching(
    r"[a-z][a-z0-9_]*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
    "a folder of jaxmodels/ (letters, digits, _), or the dotted path of a module with make_task",
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting: its default, its meaning (with unit), and what it accepts.

    Attributes:
      default: the value where no preset or command line says otherwise.
      meaning: one line for `--print_config`.
      check: a condition on values other than None.
      choices: the accepted values, where they are few.
      kind: int, float, bool, str or tuple; read off the default unless that is None.
      items: the type of a tuple's elements; read off the default unless that is empty.
      may_change: whether a run may be continued with another value of it.
      optional: whether None is accepted; so it is where None is the default.
    """

    default: Any
    meaning: str
    check: Check | None = None
    choices: tuple[Any, ...] | None = None
    kind: type | None = None
    items: type | None = None
    may_change: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "optional", self.optional or self.default is None)
        if self.kind is None and self.default is not None:
            object.__setattr__(self, "kind", type(self.default))
        if self.items is None and self.kind is tuple and self.default:
            floats = any(isinstance(item, float) for item in self.default)
            object.__setattr__(self, "items", float if floats else type(self.default[0]))
        if self.kind is not None and self.kind not in _KINDS:
            raise TypeError(
                f"Field kind {self.kind.__name__}: accepted are int, float, bool, str, tuple."
            )

    @property
    def type_name(self) -> str:
        """The type as `--print_config` shows it: `int`, `float or None`, `tuple of int`."""
        if self.kind is None:
            return "any"
        name = self.kind.__name__
        if self.kind is tuple and self.items is not None:
            name += f" of {self.items.__name__}"
        return f"{name} or None" if self.optional else name

    @property
    def accepted(self) -> str:
        """The accepted values in words: the choices, the check, or the type."""
        if self.choices is not None:
            return " | ".join(map(str, self.choices))
        return f"{self.type_name}, {self.check.accepted}" if self.check else self.type_name

    def parse(self, name: str, text: str) -> Any:
        """Returns the value that `text` of a command line stands for.

        Raises:
          FieldError: the text is not a value of this field.
        """
        try:
            value = None if self._is_none(text) else _parse(text, self.kind, self.items)
            return self.validate(name, value)
        except ValueError:
            raise self._refusal(name, text) from None

    def validate(self, name: str, value: Any) -> Any:
        """Returns `value` in the field's type (an int where float is wanted becomes one).

        Raises:
          FieldError: wrong type, out of range, or not among the choices.
        """
        if value is None and self.optional:
            return None
        try:
            value = _coerce(value, self.kind, self.items)
        except ValueError:
            raise self._refusal(name, value) from None
        chosen = self.choices is None or value in self.choices
        if not chosen or (self.check is not None and not self.check.holds(value)):
            raise self._refusal(name, value)
        return value

    def _is_none(self, text: str) -> bool:
        return self.optional and text.strip().lower() in _NONE

    def _refusal(self, name: str, value: Any) -> FieldError:
        shown = value if isinstance(value, str) else repr(value)
        near = ""
        if self.choices is not None:
            near = nearest(str(value), map(str, self.choices))
        return FieldError(f"{name}={shown}: accepted is {self.accepted}{near} ({self.meaning})")


def _parse(text: str, kind: type | None, items: type | None) -> Any:
    """Reads text as `kind`; with no kind known, as the first of int, float, bool, str that fits."""
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    if kind is tuple:
        parts = [part.strip() for part in text.strip().strip("()[]").split(",")]
        return tuple(_parse(part, items, None) for part in parts if part)
    if kind is not None:
        return kind(text)
    for guess in (int, float):
        try:
            return guess(text)
        except ValueError:
            pass
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def _coerce(value: Any, kind: type | None, items: type | None) -> Any:
    """Returns `value` as `kind`; ValueError where that would lose something."""
    if kind is None:
        return value
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(item, items, None) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(value)
    return value


def build(fields: Fields, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns the locked config of `fields` with `overrides` by dotted name.

    Raises:
      FieldError: an override of no field, or a value that its field does not take.
    """
    overrides = dict(overrides or {})
    for name in overrides:
        if name not in fields:
            raise unknown("field", name, fields)
    nested: dict[str, Any] = {}
    for name, field in fields.items():
        *parents, last = name.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise FieldError(f"field {name!r}: {parent!r} is a field itself, not a group")
        level[last] = field.validate(name, overrides.get(name, field.default))
    return ConfigDict(nested).lock()


def preset(
    fields: Fields, presets: Mapping[str, Mapping[str, Any]], name: str = "quickstart"
) -> ConfigDict:
    """Returns the config of the preset called `name`.

    Raises:
      FieldError: no such preset, or one of its values is not accepted.
    """
    if name not in presets:
        raise unknown("preset", name, presets)
    return build(fields, presets[name])


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {dotted name: value} of a config or a nested dict, in its order."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            values |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            values[key] = value
    return values


COMMON: dict[str, Field] = {
    "method": Field("", "what to train: a folder of jaxmodels/", method_name),
    "seed": Field(
        0, "seed of the parameters, of dropout and of the data order", between(0, 2**32 - 1)
    ),
    "total_steps": Field(1000, "optimiser steps in all", positive, may_change=True),
    "batch_size": Field(32, "examples a step, all devices together", positive),
    "micro_batches": Field(1, "parts a batch is computed in, one after the other", positive),
    "eval_every": Field(
        0, "steps between evaluations; 0: only at the end", non_negative, may_change=True
    ),
    "checkpoint_every": Field(
        0, "steps between checkpoints; 0: only at the end", non_negative, may_change=True
    ),
    "keep_checkpoints": Field(3, "newest checkpoints kept", positive, may_change=True),
    "keep_best": Field(
        0, "checkpoints with the best best_metric, kept besides", non_negative, may_change=True
    ),
    "best_metric": Field(
        None,
        "what keep_best compares, as EVALUATOR/METRIC",
        matching(r"[^/\s]+/[^/\s]+", "EVALUATOR/METRIC"),
        kind=str,
        may_change=True,
    ),
    "best_mode": Field(
        "max",
        "whether a good best_metric is large or small",
        choices=("max", "min"),
        may_change=True,
    ),
    "log_every": Field(10, "steps between lines of the log", positive, may_change=True),
    "warm_start": Field(None, "workdir or checkpoint whose weights alone training takes", kind=str),
    "init_from": Field(
        None,
        "weights to start from: a converted folder, a published file, or a run (its trunk, where "
        "the heads differ)",
        kind=str,
    ),
    "init_rows": Field(
        (),
        "tables with more rows than init_from's, as LEAF=repeat|fresh|new: repeat its rows, keep "
        "fresh further ones, or take none",
        each(matching(r"[^=\s]+=(repeat|fresh|new)", "LEAF=repeat, LEAF=fresh or LEAF=new")),
        items=str,
    ),
    "on_nonfinite": Field(
        "stop",
        "at a loss or gradient that is not finite: stop the run, or skip that update",
        choices=("stop", "skip"),
    ),
    "skip_grad_norm": Field(
        0.0, "norm of the gradient above which an update is skipped; 0: none is", non_negative
    ),
    "on_evaluation_error": Field(
        "stop",
        "at an evaluator that fails or gives a number that is not finite: stop, or continue",
        choices=("stop", "continue"),
        may_change=True,
    ),
    "watchdog_seconds": Field(
        1800,
        "seconds without progress after which a hanging run prints its stacks and ends; 0: never",
        non_negative,
        may_change=True,
    ),
    "profile": Field(
        0,
        "steps that jax.profiler traces, soon after this start; 0: none",
        non_negative,
        may_change=True,
    ),
    "wandb": Field(
        None,
        "Weights & Biases project to log to as well; None: none",
        matching(r"\S+", "a name without spaces"),
        kind=str,
        may_change=True,
    ),
    "distributed.timeout_seconds": Field(
        300, "seconds that processes wait for one another at the start", positive, may_change=True
    ),
    "distributed.heartbeat_seconds": Field(
        100,
        "seconds of silence after which a process counts as dead",
        at_least(10),
        may_change=True,
    ),
    "compilation_cache": Field(
        None,
        "folder of compiled programs; None: ~/.cache/jaxmodels/compiled, off: none kept",
        kind=str,
        may_change=True,
    ),
    "mesh.node": Field(
        -1, "slices or hosts (slow links); -1: inferred", inferred_or_positive, may_change=True
    ),
    "mesh.device": Field(
        -1, "devices a node (fast links); -1: inferred", inferred_or_positive, may_change=True
    ),
    "data.dir": Field(
        None,
        "folder of prepared data; None: $JAXMODELS_DATA_DIR, else ~/.cache/jaxmodels/data",
        kind=str,
        may_change=True,
    ),
    "data.num_workers": Field(
        0, "processes that prepare data; 0: a thread", non_negative, may_change=True
    ),
    "data.max_bad_records": Field(
        0, "distinct bad records left out before the run stops", non_negative, may_change=True
    ),
    "data.timeout_seconds": Field(
        300,
        "seconds without a batch after which the run ends, naming the worker; 0: never",
        non_negative,
        may_change=True,
    ),
    "optimizer.name": Field("adamw", "update rule", choices=("adamw", "adam", "sgd", "adafactor")),
    "optimizer.learning_rate": Field(1e-3, "learning rate at its peak", positive),
    "optimizer.schedule": Field(
        "cosine", "learning rate after the warm-up", choices=("constant", "linear", "cosine")
    ),
    "optimizer.warmup_steps": Field(0, "steps of linear growth at the start", non_negative),
    "optimizer.end_ratio": Field(0.0, "last learning rate as a share of the peak", fraction),
    "optimizer.b1": Field(0.9, "decay of the first moment (sgd: momentum)", between(0, 0.9999)),
    "optimizer.b2": Field(0.98, "decay of the second moment", between(0, 0.999999)),
    "optimizer.eps": Field(1e-8, "added to the root of the second moment", positive),
    "optimizer.weight_decay": Field(
        0.01, "decoupled weight decay, not on groups named no_decay or *_no_decay", non_negative
    ),
    "optimizer.clip_norm": Field(
        1.0, "largest global norm of the gradient; 0: no clipping", non_negative
    ),
}
