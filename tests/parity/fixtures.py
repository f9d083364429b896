"""Reading parity files and judging what a method computes against them; knows no method."""

import dataclasses
import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .tolerances import bound

NEAR_ZERO_BOUND = 1e-4
_OWN_MODULES = ("fixtures",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One parity file.

    Attributes:
      path: where it was read.
      method: name of its folder, which selects `tests.parity.<method>`.
      kind: selects the function of that module.
      meta: settings (of a json file: the whole document).
      params, inputs: arrays by their name without the prefix.
      expected: reference arrays by full name (`outputs/...`, `grads/...`).
    """

    path: Path
    method: str
    kind: str
    meta: dict[str, Any]
    params: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """`<method>/<file name without its ending>`."""
        return f"{self.method}/{self.path.stem}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of one file: `ok`, its name and what to print behind it."""

    ok: bool
    name: str
    detail: str

    def __str__(self) -> str:
        """The line the command prints."""
        return f"{'ok' if self.ok else 'FAIL'} {self.name} {self.detail}".rstrip()


def read_case(path: Path) -> Case:
    """Read an .npz or .json parity file.

    Raises:
      ValueError: not one of these formats, or no kind in it.
      OSError: the file cannot be opened.
    """
    arrays: dict[str, np.ndarray] = {}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        meta = json.loads(str(arrays.pop("meta", "{}")))
    elif path.suffix == ".json":
        meta = json.loads(path.read_text(encoding="utf-8"))
    else:
        raise ValueError(f"a parity file ends in .npz or .json, not {path.suffix!r}")
    if not isinstance(meta, dict) or "kind" not in meta:
        raise ValueError('no "kind" in the file: it selects the adapter')

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    return Case(
        path=path,
        method=path.resolve().parent.name,
        kind=str(meta["kind"]),
        meta=meta,
        params=group("params/"),
        inputs=group("inputs/"),
        expected={k: v for k, v in arrays.items() if k.startswith(("outputs/", "grads/"))},
    )


def devices_named(path: str) -> int:
    """Devices of the mesh that a file's settings name (n nodes of m devices), else 1."""
    try:
        config = read_case(Path(path)).meta.get("config", {})
        return int(config["n"]) * int(config["m"])
    except Exception:  # whatever is wrong with the file is the verdict's to say
        return 1


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """max|a - b| / max|b|; infinite where shapes differ or only one side is finite."""
    if ours.shape != reference.shape:
        return float("inf")
    if not reference.size:
        return 0.0
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    difference = np.where(a == b, 0.0, np.abs(a - b)).max()
    scale = np.abs(b).max()
    error = float(difference / scale) if scale else float(difference)
    return error if np.isfinite(error) else float("inf")


def array_error(ours: np.ndarray, reference: np.ndarray, rule: str) -> float:
    """Error of one array under a rule.

    Rules: `relative` (integers exactly: 0 or infinite), `set` (rows compared as sets) and
    `near_zero` (a mathematically zero value: 0 if |ours| is below 1e-4, else infinite).
    """
    if rule == "near_zero":
        fits = ours.shape == reference.shape and np.abs(ours).max() < NEAR_ZERO_BOUND
        return 0.0 if fits else float("inf")
    if rule == "set" and ours.shape == reference.shape:
        ours, reference = np.sort(ours, axis=-1), np.sort(reference, axis=-1)
    if np.issubdtype(reference.dtype, np.integer) or reference.dtype == bool:
        return 0.0 if np.array_equal(ours, reference) else float("inf")
    return relative_error(ours, reference)


def judge(case: Case, computed: Mapping[str, Any], rules: Mapping[str, str]) -> Verdict:
    """Compare every reference array of a case with what was computed.

    Args:
      case: the file.
      computed: arrays by full name; names the file does not hold are ignored.
      rules: regular expression (searched in the full name) -> rule of `array_error`.
    """
    if not case.expected:
        return Verdict(False, case.name, "the file holds nothing to compare")
    missing = sorted(set(case.expected) - set(computed))
    if missing:
        return Verdict(False, case.name, f"not computed: {', '.join(missing)}")
    worst, failed = 0.0, []
    for name, reference in case.expected.items():
        ours = np.asarray(computed[name])
        rule = next((r for p, r in rules.items() if re.search(p, name)), "relative")
        error = array_error(ours, reference, rule)
        worst = max(worst, error)
        scale = float(np.abs(reference).max()) if reference.size else 0.0
        if not bound(case.meta, name).allows(error, scale):
            shapes = f", shape {ours.shape} against {reference.shape}"
            failed.append((error, name + shapes * (ours.shape != reference.shape)))
    if failed:
        error, name = max(failed)
        return Verdict(False, case.name, f"{error:.1e} ({name})")
    return Verdict(True, case.name, f"{worst:.1e}")


def adapter(method: str) -> Any:
    """The module `tests.parity.<method>` with its `ADAPTERS` and `RULES`.

    Raises:
      ValueError: there is none; the message names the folder.
    """
    name = f"{__package__}.{method}"
    reserved = method in _OWN_MODULES or not method.isidentifier() or method.startswith("_")
    module = None
    if not reserved and not method.startswith("test_") and importlib.util.find_spec(name):
        module = importlib.import_module(name)
    if not hasattr(module, "ADAPTERS"):
        raise ValueError(f"unknown method {method!r} (the name of the file's folder)")
    return module


def check(path: Path) -> Verdict:
    """Read one file, compute it through its adapter and judge it; never raises.

    An adapter returns the computed arrays, a list of them where the library has several ways (each
    must pass), or None where the file only holds data that it could read. Where the reference
    arrays of a kind are inside its json document, the module's `EXPECTED` has a function of the
    case for it, which returns them by full name.
    """
    name = f"{path.resolve().parent.name}/{path.stem}"
    try:
        case = read_case(path)
        module = adapter(case.method)
        if case.kind not in module.ADAPTERS:
            known = ", ".join(sorted(module.ADAPTERS))
            return Verdict(False, name, f"unknown kind {case.kind!r}; known: {known}")
        if case.kind in getattr(module, "EXPECTED", {}):
            case = dataclasses.replace(case, expected=module.EXPECTED[case.kind](case))
        computed = module.ADAPTERS[case.kind](case)
        if computed is None:
            return Verdict(True, name, "data")
        variants = computed if isinstance(computed, list) else [computed]
        verdicts = [judge(case, variant, module.RULES) for variant in variants]
        return next((v for v in verdicts if not v.ok), verdicts[0])
    except Exception as error:  # one bad file must not hide the verdict on the others
        reason = str(error).split("\n")[0]
        return Verdict(False, name, f"{type(error).__name__}: {reason}")
