"""Our tree -> foreign names and layouts: the inverse of `importing`, by the same table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.core import params as params_lib
from jaxmodels.weights.rules import Rule, Rules, table_faults
from jaxmodels.weights.tensor_file import WeightsError

_Pieces = dict[int, np.ndarray]


def export_weights(params: Any, rules: Rules) -> dict[str, np.ndarray]:
    """Returns {foreign key: array} of our parameters; the inverse of `import_weights`, bit for bit.

    A tied tensor is written once, as Hugging Face's `save_pretrained` writes it: under the first
    name of its rule, or where another leaf holds the same values under a fallback of it.

    Args:
      params: nested dict of arrays, unboxed. Leaves are fetched to the host one after another.
      rules: the table to write by; rules whose leaf is absent are skipped.

    Returns:
      Arrays in the dtype of `params`; transposed ones are views, packed ones are joined. Write
      them by `save_safetensors`.

    Raises:
      WeightsError: lists every leaf without a rule, every foreign key written twice and every
        packed tensor of which a part is absent or has another size.
    """
    leaves = params_lib.flatten(params)
    writers = {rule.target: rule for rule in reversed(rules) if isinstance(rule, Rule)}
    problems = [f"no rule for our {path}" for path in leaves if path not in writers]
    problems += table_faults(rules)
    exported: dict[str, np.ndarray] = {}
    packed: dict[str, tuple[Rule, _Pieces]] = {}
    for path, rule in ((p, r) for p, r in writers.items() if p in leaves):
        leaf = np.asarray(leaves[path])
        try:
            parts = _foreign(rule, leaf)
        except ValueError as error:
            problems.append(f"our {path} of shape {leaf.shape}: {error}")
            continue
        for name, value in parts.items():
            if rule.part:
                pieces = packed.setdefault(name, (rule, {}))[1]
                twice = rule.part.index in pieces
                pieces[rule.part.index] = value
            else:
                twice = name in exported
                exported[name] = value
            if twice:
                problems.append(f"{name} would be written twice")
    problems += [f"{name} would be written twice" for name in packed.keys() & exported.keys()]
    problems += _join(packed, exported)
    _leave_out_tied([rule for path, rule in writers.items() if path in leaves], exported)
    if problems:
        raise WeightsError("the parameters do not fit the table: nothing was exported.", problems)
    return exported


def _foreign(rule: Rule, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """Returns {foreign key: array} of one leaf, copies included; ValueError where it is wrong."""
    if rule.stacked and not leaf.ndim:
        raise ValueError("a scalar, but stacked by its rule")
    if rule.layers and len(leaf) != len(rule.layers):
        raise ValueError(f"its rule names {len(rule.layers)} foreign layers")
    rule.transform.source_shape(leaf.shape[rule.stacked :])  # its own message, not NumPy's
    found = {}
    layers = rule.foreign_layers(len(leaf)) if rule.stacked else [0]
    for layer, part in zip(layers, leaf if rule.stacked else [leaf], strict=True):
        value = rule.transform.backward(part)
        for key in (rule.source, *rule.copies):
            found[key.replace("{i}", str(layer))] = value
    return found


def _leave_out_tied(rules: list[Rule], exported: dict[str, np.ndarray]) -> None:
    """Takes out what a reader finds, bit for bit, under the fallback that it looks at first."""
    for rule in (rule for rule in rules if rule.fallbacks and not rule.stacked):
        value = exported.get(rule.source)
        there = next((exported[key] for key in rule.fallbacks if key in exported), None)
        if value is not None and there is not None and _same(value, there):
            del exported[rule.source]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    # By bytes: two NaNs in the same place are the same tensor.
    same = (a.shape, a.dtype) == (b.shape, b.dtype)
    return same and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _join(packed: Mapping[str, tuple[Rule, _Pieces]], exported: dict[str, np.ndarray]) -> list[str]:
    """Adds every packed tensor to `exported`; returns what is wrong with some."""
    problems = []
    for name, (rule, pieces) in packed.items():
        shares, axis = rule.part.shares, rule.part.axis
        absent = [index + 1 for index in range(len(shares)) if index not in pieces]
        if absent:
            problems.append(f"{name}: parts {absent} of {len(shares)} are absent from our tree")
            continue
        arrays = [pieces[index] for index in range(len(shares))]
        wholes = {
            (*a.shape[:axis], a.shape[axis] * sum(shares) / share, *a.shape[axis + 1 :], a.dtype)
            for a, share in zip(arrays, shares, strict=True)
        }
        if len(wholes) != 1:
            found = [(a.shape, str(a.dtype)) for a in arrays]
            problems.append(f"{name}: its parts do not fit together in shares {shares}: {found}")
            continue
        exported[name] = np.concatenate(arrays, axis)
    return problems
