"""A run saved on one shape of mesh goes on on another: experts move, nothing else changes."""

import json

import numpy as np
import pytest

from tests.multiprocess import reference
from tests.smile import checkpoint_script, tiny
from tests.train import runs

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`whole` on 2 x 4, `copy` from step 10 on 4 x 2, and what the script found."""
    folder = tmp_path_factory.mktemp("runs")
    script = ("-m", "tests.smile.checkpoint_script", str(folder))
    done = runs.python(*script, devices=8, **reference.CACHE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mesh node 2 x device 4" in done.stdout and "mesh node 4 x device 2" in done.stdout
    return folder, json.loads(done.stdout.splitlines()[-1])


def same_way(whole, other) -> None:
    """The same first ten steps, from one file; then the same numbers within rounding."""
    wanted, found = tiny.curve(whole), tiny.curve(other)
    assert len(wanted["loss"]) == 20 and wanted["dropped_total"].max() > 0.05
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name][:10], values[:10], err_msg=name)
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-7, err_msg=name)


def test_every_device_of_a_mesh_gets_its_own_experts_of_the_same_bits(folder) -> None:
    found = folder[1]
    assert found["same_bits"]
    for held in found["laid"].values():  # 16 experts; node by node, device by device
        assert held == [[2 * place, 2 * place + 1] for place in range(8)]


def test_eight_devices_go_on_as_4_x_2(folder) -> None:
    same_way(folder[0] / "whole", folder[0] / "copy")


def test_eight_devices_go_on_as_one(folder) -> None:
    whole = folder[0] / "whole"
    alone = reference.copy_until(10, whole, folder[0] / "alone")
    tiny.train(alone, *tiny.flags(checkpoint_script.GRID, tiny.BI_LEVEL))
    same_way(whole, alone)
    experts = tiny.state(alone).params["moe_layers"]["moe"]["experts"]["wi"]
    assert len(experts.sharding.device_set) == 1
