"""Maps foreign checkpoints to our parameter trees and back, from one table of rules."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.core import params as params_lib
from jaxmodels.weights.tensor_file import TensorFile, WeightsError, as_tensor_file

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout between a foreign tensor and one of our leaves.

    Attributes:
      name: for messages.
      forward: foreign array -> our array.
      backward: our array -> foreign array.
      source_shape: our shape -> the foreign shape it comes from.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]
    source_shape: Callable[[Shape], Shape]


IDENTITY = Transform("identity", lambda x: x, lambda x: x, lambda shape: shape)
# PyTorch keeps Linear weights as [out, in]; ours are [in, out].
TRANSPOSE = Transform("transpose", np.transpose, np.transpose, lambda shape: shape[::-1])


@dataclasses.dataclass(frozen=True)
class Rule:
    """One foreign tensor (or one per layer) and the leaf it becomes.

    Attributes:
      source: foreign key; `{i}` stands for the layer, stacked over our leaf's leading axis.
      target: path of our leaf, joined by "/".
      transform: layout change from one foreign tensor to (one layer of) our leaf.
      optional: the foreign tensor may be there although the model has no such leaf.
      aliases: other foreign keys of the same tensor (tied): any is read, all present ones must be
        equal, all are written.
      fallbacks: foreign keys read when `source` and its aliases are absent; never written.
    """

    source: str
    target: str
    transform: Transform = IDENTITY
    optional: bool = False
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that all foreign keys are stacked, or none."""
        counts = {key.count("{i}") for key in (self.source, *self.aliases, *self.fallbacks)}
        if counts not in ({0}, {1}):
            raise WeightsError(
                f"rule for {self.target!r}: {{i}} must occur once in every key or never."
            )

    @property
    def stacked(self) -> bool:
        """Whether our leaf holds one foreign tensor per layer."""
        return "{i}" in self.source


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Foreign keys that hold no parameter of ours: `{i}` is a number, `*` any text."""

    pattern: str


Rules = Sequence[Rule | Ignore]


def import_weights(
    template: Any, tensors: Mapping[str, Any], rules: Rules, *, dtype: Any = None
) -> Any:
    """Returns our parameters, read from a foreign checkpoint; everything is compared first.

    Args:
      template: nested dict of arrays or `jax.ShapeDtypeStruct`, unboxed: the wanted leaves.
      tensors: what `read` returned, or any {foreign key: array}.
      rules: the table of the checkpoint's family, e.g. `hf_bert_rules()`.
      dtype: dtype of the floating-point leaves; None: that of the template's leaves.

    Returns:
      The template's tree with NumPy arrays of its own (no views of the file).

    Raises:
      WeightsError: lists every missing, unexpected, misshapen, unequal or wrongly typed tensor by
        its foreign key and our path; nothing has been loaded then.
    """
    leaves = params_lib.flatten(template)
    file = as_tensor_file(tensors)
    # A leaf that keeps its template dtype, unless it is a float and `dtype` says otherwise.
    dtypes = {
        path: np.dtype(dtype if dtype is not None and _is_float(leaf.dtype) else leaf.dtype)
        for path, leaf in leaves.items()
    }
    plan, problems = _compare(leaves, dtypes, file, rules)
    if problems:
        raise WeightsError(
            f"{file.origin} does not fit the model: {len(problems)} problems; nothing was loaded.",
            problems,
        )
    loaded = {}
    for path, leaf in leaves.items():
        rule, keys = plan[path]
        loaded[path] = _load(file, rule, keys, tuple(leaf.shape), dtypes[path])
    return params_lib.unflatten(loaded)


def _load(
    file: TensorFile, rule: Rule, keys: Sequence[str], shape: Shape, dtype: np.dtype
) -> np.ndarray:
    leaf = np.empty(shape, dtype)
    if not rule.stacked:
        leaf[...] = rule.transform.forward(file[keys[0]])
        return leaf
    for layer, key in enumerate(keys):
        leaf[layer] = rule.transform.forward(file[key])
    return leaf


def _is_float(dtype: Any) -> bool:
    # jax.dtypes and not NumPy's issubdtype: it counts bfloat16 and float8 as floating point.
    return jax.dtypes.issubdtype(dtype, np.floating)


def _compare(
    leaves: Mapping[str, Any], dtypes: Mapping[str, np.dtype], file: TensorFile, rules: Rules
) -> tuple[dict[str, tuple[Rule, list[str]]], list[str]]:
    """Returns ({our path: (rule, foreign keys)}, problems)."""
    plan: dict[str, tuple[Rule, list[str]]] = {}
    problems: list[str] = []
    claimed: set[str] = set()
    for rule in rules:
        if not isinstance(rule, Rule) or rule.target not in leaves or rule.target in plan:
            continue
        shape = tuple(leaves[rule.target].shape)
        if rule.stacked and not shape:
            problems.append(f"misshapen: our {rule.target} is a scalar but stacked by its rule")
            continue
        keys = []
        for layer in range(shape[0]) if rule.stacked else [0]:
            key, names, faults = _choose(rule, layer, file)
            claimed.update(names)
            problems += faults
            keys.append(key)
            wanted = rule.transform.source_shape(shape[1:] if rule.stacked else shape)
            problems += _fit(rule, key, file, wanted, dtypes[rule.target])
        plan[rule.target] = (rule, keys)
    for path in leaves.keys() - plan.keys():
        problems.append(f"missing: no rule gives our {path} (shape {tuple(leaves[path].shape)})")
    problems += _unexpected(file.keys() - claimed, leaves, rules)
    return plan, sorted(problems, key=_natural)


def _choose(rule: Rule, layer: int, file: TensorFile) -> tuple[str, list[str], list[str]]:
    """Returns the key to read for a layer, all keys it accounts for, and unequal duplicates."""
    tied = [key.replace("{i}", str(layer)) for key in (rule.source, *rule.aliases)]
    present = [key for key in tied if key in file]
    if not present:
        others = [key.replace("{i}", str(layer)) for key in rule.fallbacks]
        present = [key for key in others if key in file][:1] or tied[:1]
        return present[0], present, []
    faults = [
        f"unequal: {key} and {present[0]} must be the same tensor (our {rule.target})"
        for key in present[1:]
        if not _same(file, key, present[0])
    ]
    return present[0], present, faults


def _same(file: TensorFile, a: str, b: str) -> bool:
    if file.shape(a) != file.shape(b) or file.dtype(a) != file.dtype(b):
        return False
    first, second = np.ascontiguousarray(file[a]), np.ascontiguousarray(file[b])
    # By bytes: two NaNs in the same place are the same tensor.
    return np.array_equal(first.reshape(-1).view(np.uint8), second.reshape(-1).view(np.uint8))


def _fit(rule: Rule, key: str, file: TensorFile, wanted: Shape, dtype: np.dtype) -> list[str]:
    """Returns what is wrong with the tensor `key` for (a layer of) our leaf."""
    where = f"{key} -> our {rule.target}"
    if key not in file:
        return [f"missing: {where}: wanted shape {wanted}"]
    found, source = file.shape(key), file.dtype(key)
    problems = []
    if found != wanted:
        hint = " (transposed?)" if found == wanted[::-1] else ""
        problems.append(f"misshapen: {where}: found shape {found}, wanted {wanted}{hint}")
    fits = _is_float(source) if _is_float(dtype) else np.can_cast(source, dtype, "safe")
    if not fits:
        problems.append(f"wrong dtype: {where}: found {source}, wanted {dtype}")
    return problems


def _unexpected(keys: Iterable[str], leaves: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    """Yields a line for every foreign key that neither the model nor the table accounts for."""
    accepted = [_pattern(rule.pattern) for rule in rules if isinstance(rule, Ignore)]
    known: list[tuple[re.Pattern[str], str]] = []
    sources = {rule.source for rule in rules if isinstance(rule, Rule)}
    for rule in rules:
        if not isinstance(rule, Rule):
            continue
        # A fallback that is another rule's source (a tied tensor) is that rule's to account for.
        fallbacks = [key for key in rule.fallbacks if key not in sources]
        patterns = [_pattern(key) for key in (rule.source, *rule.aliases, *fallbacks)]
        known += [(pattern, rule.target) for pattern in patterns]
        if rule.optional and rule.target not in leaves:
            accepted += patterns
    for key in keys:
        if any(pattern.fullmatch(key) for pattern in accepted):
            continue
        targets = [target for pattern, target in known if pattern.fullmatch(key)]
        note = f": the model has no place for it at {targets[0]}" if targets else ""
        yield f"unexpected: {key}{note}"


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{i\}", r"\d+").replace(r"\*", ".*"), re.DOTALL)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    parts = re.split(r"([0-9]+)", text)
    # Long digit runs (a hostile key) stay text: Python refuses to convert them.
    return [(0, int(p), "") if p.isdigit() and len(p) < 9 else (1, 0, p) for p in parts]


def export_weights(params: Any, rules: Rules) -> dict[str, np.ndarray]:
    """Returns {foreign key: array} of our parameters; the inverse of `import_weights`, bit for bit.

    Args:
      params: nested dict of arrays, unboxed. Leaves are fetched to the host one after another.
      rules: the table to write by; rules whose leaf is absent are skipped.

    Returns:
      Arrays in the dtype of `params`; transposed ones are views. Write them by `save_safetensors`.

    Raises:
      WeightsError: lists every leaf without a rule and every foreign key written twice.
    """
    leaves = params_lib.flatten(params)
    writers = {rule.target: rule for rule in reversed(rules) if isinstance(rule, Rule)}
    problems = [f"no rule for our {path}" for path in leaves if path not in writers]
    exported: dict[str, np.ndarray] = {}
    for path, rule in ((p, r) for p, r in writers.items() if p in leaves):
        leaf = np.asarray(leaves[path])
        if rule.stacked and not leaf.ndim:
            problems.append(f"our {path} is a scalar but stacked by its rule")
            continue
        for layer, part in enumerate(leaf if rule.stacked else [leaf]):
            value = rule.transform.backward(part)
            for key in (rule.source, *rule.aliases):
                name = key.replace("{i}", str(layer))
                if name in exported:
                    problems.append(f"{name} would be written twice")
                exported[name] = value
    if problems:
        raise WeightsError("the parameters do not fit the table: nothing was exported.", problems)
    return exported
