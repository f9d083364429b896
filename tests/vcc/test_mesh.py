"""VCC on eight simulated devices: selection, write-back and remat must not depend on the mesh."""

import json

import numpy as np
import pytest

from tests.train import runs

pytestmark = pytest.mark.slow


def test_vcc_training_on_every_mesh_equals_one_device(tmp_path) -> None:
    done = runs.python("-m", "tests.vcc.mesh_script", str(tmp_path), devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["1x1"]["losses"][-1] < found["1x1"]["losses"][0] + 0.5
    for mesh, rows in (("1x8", 250), ("2x4", 500), ("8x1", 2000)):
        np.testing.assert_allclose(found[mesh]["losses"], found["1x1"]["losses"], rtol=2e-5)
        assert found[mesh]["rows"] == rows  # 2,000 rows of the word table, split over `device`
    assert "rematerialization" not in done.stderr  # the partitioner never gathers a whole batch
