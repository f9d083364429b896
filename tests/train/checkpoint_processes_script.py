"""Run by test_checkpoint_processes.py as two processes of two devices: saves, fails, restores."""

import argparse
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.train import checkpoint_cases as cases
from train import distributed
from train.checkpoint import Checkpoints, manifest
from train.checkpoint import arrays as arrays_lib
from train.errors import UsageError
from train.state import TrainState


def placed(step: int) -> TrainState:
    """The state of the cases, its kernel split over all devices of all processes."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    split = NamedSharding(mesh, PartitionSpec("device"))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.jit(jax.random.wrap_key_data, out_shardings=whole)(data)
        value = np.asarray(leaf)
        where = split if value.shape == (20, 30) else whole
        return jax.make_array_from_callback(value.shape, where, value.__getitem__)

    return jax.tree.map(place, cases.state(step, frozen=cases.frozen()))


def same(found: TrainState, wanted: TrainState) -> None:
    """Compares what this process holds of each leaf, bit by bit."""
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jax.dtypes.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = map(jax.random.key_data, (got, want))
        assert got.dtype == want.dtype and got.sharding.is_equivalent_to(want.sharding, got.ndim)
        for mine, other in zip(got.addressable_shards, want.addressable_shards, strict=True):
            assert mine.index == other.index
            assert np.asarray(mine.data).tobytes() == np.asarray(other.data).tobytes()


def fails_once(owner: Any, name: str, error: Exception) -> None:
    """The next call of `owner.name` raises."""
    real = getattr(owner, name)

    def refuse(*_: Any, **__: Any) -> Any:
        setattr(owner, name, real)
        raise error

    setattr(owner, name, refuse)


def polled(saved: Checkpoints, step: int) -> str | None:
    """Saves a step, and polls until it is known how that went."""
    saved.save(step, placed(step), {"position": step})
    while saved._writer.step is not None:
        error = saved.poll()
        if error:
            return error
        time.sleep(0.02)
    return None


def failures(folder: pathlib.Path, me: int) -> None:
    """One process fails; both hear of it, and both save again."""
    arrays_lib._SECONDS = 5  # the other waits for it no longer
    with Checkpoints(folder / "failing") as saved:
        if me == 1:
            fails_once(arrays_lib, "progress_file", OSError(28, "No space left"))
        error = polled(saved, 1)
        failure = "checkpoint 1 was not written: process 1: OSError: [Errno 28] No space left"
        assert error == failure
        assert polled(saved, 1) is None
        if me == 0:
            fails_once(manifest, "write", OSError(5, "Input/output error"))
        error = polled(saved, 2)
        failure = "checkpoint 2 was not written: process 0: OSError: [Errno 5] Input/output error"
        assert error == failure
        assert saved.wait() is None
        assert polled(saved, 3) is None
        same(saved.restore(cases.plan(placed(0))).state, placed(3))
        assert saved.steps() == [1, 3]


def main(folder: pathlib.Path) -> None:
    """All of it; any failed assertion ends the process with a traceback."""
    me = jax.process_index()
    for name, place in (("equal", 0), ("apart", me)):
        with Checkpoints(folder / name, say=print) as saved:
            assert saved.restore(cases.plan(placed(0))) is None
            for step in (1, 2):
                saved.save(step, placed(step), {"position": [step, place], "who": me})
            assert saved.wait() is None
            found = saved.restore(cases.plan(placed(0)))
            same(found.state, placed(2))
            assert found.progress == {"position": [2, place], "who": me}
    with Checkpoints(folder / "alone") as saved:  # written by one process
        found = saved.restore(cases.plan(placed(0)))
        assert found.progress["position"] == {"next": 2}
        same(found.state, placed(2))
    distributed.first(lambda: str(shutil.copytree(folder / "equal", folder / "damaged")))
    distributed.first(
        lambda: (folder / "damaged/checkpoints/2/progress/process_1_of_2.json").unlink()
    )
    with Checkpoints(folder / "damaged", say=print) as saved:
        assert saved.restore(cases.plan(placed(0))).step == 1
        wrong = placed(0)
        wrong.trainable["layer"]["bias"] = jnp.zeros(3)
        try:
            saved.restore(cases.plan(wrong))
        except UsageError as error:
            assert "bias is bfloat16[30], wanted float32[3]" in str(error)
        else:
            raise AssertionError("not refused")
    failures(folder, me)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    flags = parser.parse_args()
    distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id, 60, 60)
    main(flags.folder)
    print("all of it held", flush=True)
    distributed.leave(0)
