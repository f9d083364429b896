"""A checkpoint holds the same bits on every mesh and number of devices (F13)."""

import jax
import jax.numpy as jnp

from tests.train import checkpoint_cases as cases
from tests.train import runs
from train.checkpoint import Checkpoints


def test_f13_eight_devices_save_and_any_mesh_restores_the_same_bits(tmp_path):
    done = runs.python("-m", "tests.train.checkpoint_mesh_script", str(tmp_path), devices=8)
    assert done.stdout.endswith("all of it held\n"), done.stderr[-3000:]
    assert "warn" not in done.stderr.lower(), done.stderr[-3000:]
    # This process has one device.
    wanted = cases.state(1, frozen={"table": jnp.arange(64.0).reshape(8, 8)})
    cut = jax.tree.map(lambda x: jnp.tile(x, 2)[:8, :8] if x.shape == (20, 30) else x, wanted)
    for number in range(3):
        with Checkpoints(tmp_path / str(number)) as saved:
            cases.assert_same(saved.restore(cases.plan(cut)).state, cut)
