"""States small enough to save by the hundred, and how to compare them bit by bit."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoint import Checkpoints
from train.state import Layout, TrainState


def state(step: int = 0, **changes: Any) -> TrainState:
    """A state whose every trained value tells the step; `changes` replace its parts."""
    weights = jnp.arange(600, dtype=jnp.float32).reshape(20, 30) + step / 7
    parts = {
        "trainable": {"layer": {"kernel": weights, "bias": jnp.full((30,), step, jnp.bfloat16)}},
        "frozen": {},
        "opt_state": ({"mu": {"layer": {"kernel": weights * 2}}}, None, jnp.int32(step)),
        "step": jnp.int32(step),
        "rng": jax.random.key(3),
    }
    return TrainState(**parts | changes)


def frozen() -> dict[str, Any]:
    """Frozen parameters, for `state(frozen=...)`."""
    return {"trunk": {"kernel": jnp.arange(500, dtype=jnp.float32).reshape(5, 100) / 3}}


def plan(of: TrainState) -> Layout:
    """The layout of a state that exists."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return Layout(jax.tree.map(struct, of), {}, None)


def assert_same(found: TrainState, wanted: TrainState) -> None:
    """Compares structure, shapes, types, places and every bit."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    leaves = jax.tree_util.tree_flatten_with_path(wanted)[0]
    for (path, want), got in zip(leaves, jax.tree.leaves(found), strict=True):
        where = jax.tree_util.keystr(path)
        assert (got.dtype, got.shape) == (want.dtype, want.shape), where
        assert got.sharding.is_equivalent_to(want.sharding, want.ndim), where
        assert bits(got) == bits(want), where


def bits(leaf: Any) -> bytes:
    """The bytes of an array or of the data of keys."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def run(workdir: pathlib.Path, steps: range, **settings: Any) -> pathlib.Path:
    """Saves those steps one after the other; returns the folder of checkpoints."""
    parts = settings.pop("parts", {})
    with Checkpoints(workdir, **settings) as saved:
        for step in steps:
            saved.save(step, state(step, **parts), {"position": {"next": step}})
            assert saved.wait() is None
    return workdir / "checkpoints"


def names(folder: pathlib.Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
