"""Foreign checkpoint -> our tree: everything is compared first, then read leaf by leaf."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.core import params as params_lib
from jaxmodels.weights.rules import Rule, Rules, natural_order, pattern, table_faults, unexpected
from jaxmodels.weights.tensor_file import TensorFile, WeightsError, as_tensor_file
from jaxmodels.weights.transforms import Shape

Index = tuple[slice, ...]

# Arrays from this size on get memory of their own from the system.
_OWN_MEMORY = 1 << 20


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
    sources = leaf_sources(template, tensors, rules, dtype=dtype)
    return params_lib.unflatten({path: source.read() for path, source in sources.items()})


def import_tree(tensors: Mapping[str, Any], rules: Rules, *, dtype: Any = None) -> Any:
    """Returns our parameters without a template: the tree is what the table makes of the file.

    Args: as `import_weights`; `dtype` None keeps the file's own.

    Raises:
      WeightsError: as `import_weights`, and where a rule that is not optional finds no tensor.
    """
    return import_weights(tree_of(tensors, rules), tensors, rules, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """Where the values of one leaf of ours lie in a checked file.

    Attributes:
      file: the file.
      rule: the leaf's rule.
      keys: the foreign key of each of its layers (one where it is not stacked).
      shape: of the leaf.
      dtype: of the leaf.
    """

    file: TensorFile
    rule: Rule
    keys: tuple[str, ...]
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index | None = None) -> np.ndarray:
        """Returns the leaf, or the part of it at `index`, as a new array.

        Only the layers inside `index` are opened, and of each only what lies inside is copied out
        of the memory-mapped file: transforms and slices are views of it.

        Args:
          index: one slice (step 1) per axis of the leaf; None: all of it.
        """
        index = index or (slice(None),) * len(self.shape)
        spans = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        out = _room(tuple(len(span) for span in spans), self.dtype)
        if not self.rule.stacked:
            out[...] = self._layer(0)[index]
            return out
        for place, layer in enumerate(spans[0]):
            out[place] = self._layer(layer)[index[1:]]
        return out

    def _layer(self, layer: int) -> np.ndarray:
        values = self.file[self.keys[layer]]
        if self.rule.part:
            values = self.rule.part.take(values)
        return self.rule.transform.forward(values)


def _room(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns a new array, to be filled, whose memory is given back as soon as it is let go.

    Its pages come from the system, because the C library keeps freed blocks of up to 32 MB: beside
    the largest shard, two others were still held. And they begin where a page does: a CPU device
    takes the array as it is, where it copies one of NumPy's, which begin 16 bytes into a page.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _OWN_MEMORY:
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def leaf_sources(
    template: Any, tensors: Mapping[str, Any], rules: Rules, *, dtype: Any = None
) -> dict[str, LeafSource]:
    """Returns {our path: where to read it}, after the comparison that `import_weights` makes.

    Args and Raises: as `import_weights`. No value is read but to compare tied tensors.
    """
    leaves = params_lib.flatten(template)
    file = as_tensor_file(tensors)
    # A leaf keeps its template dtype, unless it is a float and `dtype` says otherwise.
    dtypes = {
        path: np.dtype(dtype if dtype is not None and is_float(leaf.dtype) else leaf.dtype)
        for path, leaf in leaves.items()
    }
    plan, problems = _compare(leaves, dtypes, file, rules)
    if problems:
        raise WeightsError(
            f"{file.origin} does not fit the model: {len(problems)} problems; nothing was loaded.",
            problems,
        )
    return {
        path: LeafSource(file, *plan[path], tuple(leaf.shape), dtypes[path])
        for path, leaf in leaves.items()
    }


def is_float(dtype: Any) -> bool:
    """Tells whether `dtype` is floating point, bfloat16 and float8 included."""
    # jax.dtypes and not NumPy's issubdtype, which does not count those.
    return jax.dtypes.issubdtype(dtype, np.floating)


def _compare(
    leaves: Mapping[str, Any], dtypes: Mapping[str, np.dtype], file: TensorFile, rules: Rules
) -> tuple[dict[str, tuple[Rule, tuple[str, ...]]], list[str]]:
    """Returns ({our path: (rule, foreign keys)}, problems)."""
    plan: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    problems = table_faults(rules)
    claimed: set[str] = set()
    for rule in rules:
        if not isinstance(rule, Rule) or rule.target not in leaves or rule.target in plan:
            continue
        shape = tuple(leaves[rule.target].shape)
        if fault := _stack_fault(rule, shape):
            problems.append(fault)
            continue
        keys = []
        for layer in rule.foreign_layers(shape[0] if rule.stacked else 1):
            key, names, faults = _choose(rule, layer, file)
            claimed.update(names)
            problems += faults
            keys.append(key)
            problems += _fit(rule, key, file, shape[rule.stacked :], dtypes[rule.target])
        plan[rule.target] = (rule, tuple(keys))
    for path in leaves.keys() - plan.keys():
        problems.append(f"missing: no rule gives our {path} (shape {tuple(leaves[path].shape)})")
    problems += _incomplete(plan, rules)
    problems += unexpected(file.keys() - claimed, leaves, rules)
    return plan, sorted(dict.fromkeys(problems), key=natural_order)


def _stack_fault(rule: Rule, shape: Shape) -> str | None:
    if rule.stacked and not shape:
        return f"misshapen: our {rule.target} is a scalar but stacked by its rule"
    if rule.layers and shape[0] != len(rule.layers):
        return (
            f"misshapen: our {rule.target} stacks {shape[0]} layers, its rule names "
            f"{len(rule.layers)} foreign ones"
        )
    return None


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


def _fit(rule: Rule, key: str, file: TensorFile, ours: Shape, dtype: np.dtype) -> list[str]:
    """Returns what is wrong with the tensor `key` for (a layer of) our leaf of shape `ours`."""
    where = f"{key} -> our {rule.target}"
    try:
        wanted = rule.source_shape(ours)
    except ValueError as error:
        return [f"misshapen: our {rule.target}: {error} (by {rule.transform.name})"]
    if key not in file:
        return [f"missing: {where}: wanted shape {wanted}"]
    found, source = file.shape(key), file.dtype(key)
    problems = []
    if found != wanted:
        hint = " (transposed?)" if found == wanted[::-1] else ""
        problems.append(f"misshapen: {where}: found shape {found}, wanted {wanted}{hint}")
    fits = is_float(source) if is_float(dtype) else np.can_cast(source, dtype, "safe")
    if not fits:
        problems.append(f"wrong dtype: {where}: found {source}, wanted {dtype}")
    return problems


def _incomplete(plan: Mapping[str, tuple[Rule, Any]], rules: Rules) -> list[str]:
    """Returns a line for each part of a packed tensor that the model leaves out."""
    taken = {rule.source for rule, _ in plan.values() if rule.part}
    return [
        f"incomplete: {rule.source} is read for other leaves, but the model has no place for its "
        f"part {rule.part.index + 1} of {len(rule.part.shares)} at {rule.target}"
        for rule in rules
        if isinstance(rule, Rule) and rule.part
        if rule.source in taken and rule.target not in plan
    ]


def tree_of(tensors: Mapping[str, Any], rules: Rules) -> Any:
    """Returns the tree of `jax.ShapeDtypeStruct` that the table makes of a file's keys and shapes.

    A stack is as deep as the file has layers under the keys that start alike up to `{i}`.

    Raises:
      WeightsError: lists every rule that finds no tensor and is not optional, and every tensor
        that its rule cannot shape.
    """
    file = as_tensor_file(tensors)
    depths = _depths(file, rules)
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    problems = table_faults(rules)
    for rule in (r for r in rules if isinstance(r, Rule)):
        if rule.target in leaves:
            continue
        depth = depths.get(_stack_name(rule), 0) if rule.stacked else 1
        keys = [_choose(rule, layer, file)[0] for layer in rule.foreign_layers(depth)]
        present = [key for key in keys if key in file]
        if not present:
            if not rule.optional:
                problems.append(f"missing: {rule.source} -> our {rule.target}")
            continue
        try:
            shape = rule.target_shape(file.shape(present[0]))
        except ValueError as error:
            problems.append(f"misshapen: {present[0]} -> our {rule.target}: {error}")
            continue
        shape = (len(keys), *shape) if rule.stacked else shape
        leaves[rule.target] = jax.ShapeDtypeStruct(shape, file.dtype(present[0]))
    if problems:
        raise WeightsError(
            f"{file.origin} does not fit the table: {len(problems)} problems; nothing was loaded.",
            sorted(problems, key=natural_order),
        )
    return params_lib.unflatten(leaves)


def _stack_name(rule: Rule) -> str:
    return rule.source.partition("{i}")[0]


def _depths(file: TensorFile, rules: Rules) -> dict[str, int]:
    """Returns {start of the keys: number of layers} of every stack whose rules name no layers."""
    found: dict[str, set[str]] = {}
    for rule in rules:
        if isinstance(rule, Rule) and rule.stacked and rule.layers is None:
            layers = found.setdefault(_stack_name(rule), set())
            for key in rule.keys:
                matches = map(pattern(key).fullmatch, file)
                layers.update(match.group(1) for match in matches if match)
    for name, layers in found.items():
        # Compared as text: a hostile number may be too long to convert.
        if gaps := sorted(set(map(str, range(len(layers)))) - layers, key=natural_order):
            raise WeightsError(
                f"{file.origin}: the layers under {name!r} are not numbered 0 to "
                f"{len(layers) - 1}: {_some(gaps)} missing."
            )
    return {name: len(layers) for name, layers in found.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
