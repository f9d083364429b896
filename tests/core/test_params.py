"""Trees of parameters: splitting, merging and counting lose nothing, whatever the nesting."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.core import params as params_lib

names = st.text("abcxyz_0", min_size=1, max_size=4)
leaves = st.integers(1, 50).map(lambda n: np.full((n,), n, np.float32))
trees = st.dictionaries(
    names,
    st.recursive(
        leaves, lambda t: st.dictionaries(names, t, min_size=1, max_size=4), max_leaves=12
    ),
    min_size=1,
    max_size=4,
)
some_seconds = settings(max_examples=60, deadline=None)


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@some_seconds
@given(trees)
def test_flatten_then_unflatten_is_the_tree_itself(tree: Any) -> None:
    flat = params_lib.flatten(tree)
    assert same(params_lib.unflatten(flat), tree)
    for path, leaf in flat.items():
        node = tree
        for part in path.split("/"):
            node = node[part]
        assert node is leaf


@some_seconds
@given(trees, st.data())
def test_split_then_merge_is_the_tree_itself(tree: Any, data: st.DataObject) -> None:
    paths = sorted(params_lib.flatten(tree))
    wanted = set(data.draw(st.lists(st.sampled_from(paths), unique=True)))
    picked, rest = params_lib.split(tree, wanted.__contains__)
    assert set(params_lib.flatten(picked)) == wanted
    assert set(params_lib.flatten(rest)) == set(paths) - wanted
    assert same(params_lib.merge(picked, rest), tree) and same(params_lib.merge(rest, picked), tree)
    assert same(params_lib.select(tree, wanted.__contains__), picked)


@some_seconds
@given(trees)
def test_count_and_bytes_are_sums_over_leaves(tree: Any) -> None:
    sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
    assert params_lib.count(tree) == sum(sizes)
    assert params_lib.size_bytes(tree) == 4 * sum(sizes)
    abstract = jax.eval_shape(lambda: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree))
    assert params_lib.count(abstract) == sum(sizes)
    assert params_lib.size_bytes(abstract) == 2 * sum(sizes)


def test_merging_trees_that_share_a_leaf_names_it() -> None:
    with pytest.raises(ValueError, match="1 leaves are in both trees.*a/b"):
        params_lib.merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


def test_only_matrices_are_decayed() -> None:
    matrix = np.zeros((2, 3))  # stacked biases and scales have two axes as well
    tree = {
        "ffn": {"wi": {"kernel": matrix, "bias": matrix}},
        "norm": {"scale": matrix, "bias": np.zeros(3)},
        "word": {"embedding": matrix},
        "relative_bias": {"embedding": matrix},
    }
    labels = params_lib.flatten(params_lib.weight_decay_groups(tree))
    decayed = {path for path, group in labels.items() if group == "decay"}
    assert decayed == {"ffn/wi/kernel", "word/embedding"}
    assert set(labels.values()) == {"decay", "no_decay"}
