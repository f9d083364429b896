"""Parameters as nested dicts: pick, split, merge and count them by path."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

Tree = Any
Predicate = Callable[[str], bool]


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf}, paths joined by "/": `encoder/layers/ffn/wi/kernel`."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Returns the nested dict of {path: leaf}; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def select(tree: Tree, predicate: Predicate) -> Tree:
    """Returns the nested dict of only those leaves whose path satisfies `predicate`."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if predicate(path)})


def split(tree: Tree, predicate: Predicate) -> tuple[Tree, Tree]:
    """Returns (leaves whose path satisfies `predicate`, the rest), each a nested dict."""
    return select(tree, predicate), select(tree, lambda path: not predicate(path))


def merge(first: Tree, second: Tree) -> Tree:
    """Returns the union of two trees.

    Raises:
      ValueError: a leaf is in both.
    """
    a, b = flatten(first), flatten(second)
    both = sorted(a.keys() & b.keys())
    if both:
        raise ValueError(f"merge: {len(both)} leaves are in both trees, first {both[:3]}.")
    return unflatten(a | b)


def label(tree: Tree, rule: Callable[[str, Any], str]) -> Tree:
    """Returns a tree of `rule(path, leaf)`: the labels of `Task.param_groups`."""
    return unflatten({path: rule(path, leaf) for path, leaf in flatten(tree).items()})


def weight_decay_groups(tree: Tree) -> Tree:
    """Labels matrices `"decay"`; biases, norm scales and relative-bias tables `"no_decay"`."""

    def rule(path: str, leaf: Any) -> str:
        exempt = path.endswith(("/bias", "/scale")) or "relative_bias" in path
        return "no_decay" if exempt or leaf.ndim < 2 else "decay"

    return label(tree, rule)


def count(tree: Tree) -> int:
    """Returns the number of scalars in `tree` (arrays or shape structs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
    """Returns the bytes that the leaves of `tree` take, all devices together, unreplicated."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
