"""VCC on eight simulated devices: selection, write-back and remat must not depend on the mesh."""

import json

import numpy as np
import pytest

from tests.train import runs

pytestmark = pytest.mark.slow


# Rows of the word table, which has 2,000, on each device: they are split over `device`.
@pytest.mark.parametrize(
    "rows", [{"2x4": 500}, pytest.param({"1x8": 250, "8x1": 2000}, marks=pytest.mark.long)]
)
def test_vcc_training_on_every_mesh_equals_one_device(rows, tmp_path) -> None:
    done = runs.python("-m", "tests.vcc.mesh_script", str(tmp_path), "1x1", *rows, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["1x1"]["losses"][-1] < found["1x1"]["losses"][0] + 0.5
    for mesh in rows:
        np.testing.assert_allclose(found[mesh]["losses"], found["1x1"]["losses"], rtol=2e-5)
        assert found[mesh]["rows"] == rows[mesh]
    assert "rematerialization" not in done.stderr  # the partitioner never gathers a whole batch
