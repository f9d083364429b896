"""On simulated devices the layer gives what it gives on one, by every transport."""

import json

import pytest

from tests.train import runs

pytestmark = pytest.mark.slow


def test_transports_are_bit_identical_and_every_mesh_equals_one_device() -> None:
    done = runs.python("-m", "tests.smile.mesh_script", devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["transports"]) == 5
    assert set(found["transports"].values()) == {0.0}, found["transports"]
    assert len(found["meshes"]) == 4
    for mesh, difference in found["meshes"].items():
        assert difference < 5e-6, (mesh, difference)
