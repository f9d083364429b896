"""Trees of every kind come back bit for bit (F43)."""

import collections
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train import checkpoint_cases as cases
from train.checkpoint import Checkpoints, leaves

Slots = collections.namedtuple("Slots", "mu nu")
DTYPES = ("bool", "int8", "uint4", "uint32", "int32", "float16", "bfloat16", "float32")
DTYPES += ("float8_e4m3fn", "complex64", "int4")
SHAPES = ((), (1,), (3,), (0,), (2, 0, 3), (2, 3), (1, 2, 2))

part = st.text(st.characters(blacklist_categories=["Cs"]), max_size=6)
name = st.one_of(st.sampled_from(["kernel", "a.b", "a/b", "", "%packed", "0", "é", "~"]), part)


@st.composite
def arrays(draw):
    """An array of any type and shape, zeros, NaN and infinities among its bits."""
    dtype, shape = jnp.dtype(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    values = rng.integers(0, 2 if dtype.kind == "b" else 7, shape).astype(dtype)
    if dtype.name in ("float16", "bfloat16", "float32") and values.size:
        values.flat[0] = draw(st.sampled_from([np.nan, -np.inf, -0.0, 1e-7]))
    return jnp.asarray(values)


@st.composite
def keys(draw):
    """Typed keys of any implementation and number."""
    kind = draw(st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]))
    key = jax.random.key(draw(st.integers(0, 9)), impl=kind)
    return jax.random.split(key, 3) if draw(st.booleans()) else key


leaf = st.one_of(arrays(), keys())
params = st.recursive(
    st.dictionaries(name, leaf, max_size=3),
    lambda inner: st.dictionaries(name, st.one_of(inner, leaf), max_size=3),
    max_leaves=6,
)
slots = st.recursive(
    st.one_of(leaf, st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Slots, inner, inner),
        st.dictionaries(name, inner, max_size=2),
    ),
    max_leaves=6,
)


def comes_back(state):
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as saved:
        saved.save(1, state, {})
        assert saved.wait() is None
        cases.assert_same(saved.restore(cases.plan(state)).state, state)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trainable=params, frozen=params, opt_state=slots)
def test_f43_odd_trees_come_back_bit_for_bit(trainable, frozen, opt_state):
    parts = {"trainable": {"t": trainable}, "frozen": {"f": frozen}, "opt_state": opt_state}
    comes_back(cases.state(1, **parts))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tree=slots, many=st.booleans())
def test_f43_packing_is_exact(tree, many):
    wanted = leaves.named(tree)
    with mock.patch.object(leaves, "MANY", -1 if many else leaves.MANY):
        stored, packed = leaves.pack(wanted)
    assert not many or len(packed) == len(wanted)
    assert not any(leaf.size == 0 for leaf in jax.tree.leaves(stored))
    structs = leaves.named(jax.tree.map(lambda x: x, cases.plan(tree).abstract))
    wished = leaves.stored_tree(structs, packed)
    assert jax.tree.structure(wished) == jax.tree.structure(stored)
    found = leaves.unpack(jax.tree.map(jnp.asarray, stored), structs, packed)
    assert {k: cases.bits(v) for k, v in found.items()} == {
        k: cases.bits(v) for k, v in wanted.items()
    }


@settings(deadline=None, derandomize=True)
@given(first=st.lists(part, min_size=1, max_size=4), second=st.lists(part, min_size=1, max_size=4))
def test_f43_two_paths_never_get_one_name(first, second):
    def tree(path):
        found = jnp.int32(0)
        for key in reversed(path):
            found = {key: found}
        return found

    same = leaves.named(tree(first)).keys() == leaves.named(tree(second)).keys()
    assert same == (first == second)


def test_ordinary_paths_are_their_names():
    tree = {"layer_1": {"query-key": {"kernel": jnp.ones(2)}}}
    assert list(leaves.named(tree)) == ["layer_1/query-key/kernel"]


def test_a_state_of_nothing_but_empty_leaves_comes_back():
    comes_back(cases.state(1, trainable={"a": jnp.zeros((0, 3))}, frozen={"b": jnp.zeros(0)}))


@pytest.mark.long
def test_f43_twenty_thousand_leaves_take_seconds(tmp_path):
    """One by one orbax takes 20 s to write and as long to read them."""
    values = np.random.default_rng(0).standard_normal((20_000, 3)).astype(np.float32)
    placed = jax.device_put(list(values))
    tree = {
        f"group_{i}": {f"leaf_{j}": placed[100 * i + j] for j in range(100)} for i in range(200)
    }
    state = cases.state(1, trainable=tree, opt_state=())
    began = time.monotonic()
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state, {})
        assert saved.wait() is None
        cases.assert_same(saved.restore(cases.plan(state)).state, state)
    assert time.monotonic() - began < 60
