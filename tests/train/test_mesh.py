"""Eight simulated devices against one, on every shape of mesh, in one process of its own."""

import json
import os

import numpy as np
import pytest

from tests.train import runs

pytestmark = pytest.mark.slow
EIGHT = ("1x8", "2x4", "8x1")


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    cache = request.config.rootpath / ".pytest_cache" / "mesh"
    done = runs.python(
        "-m",
        "tests.train.mesh_script",
        str(tmp_path_factory.mktemp("mesh")),
        devices=8,
        JAX_COMPILATION_CACHE_DIR=os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
        PYTHONHASHSEED="0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.mark.parametrize("mesh", EIGHT)
def test_eight_devices_equal_one(found, mesh):
    one, eight = found["meshes"]["1x1"], found["meshes"][mesh]
    assert eight["start"] == one["start"]  # the same initial weights, bit by bit
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    for path, total in one["sums"].items():
        assert eight["sums"][path] == pytest.approx(total, rel=1e-5), path


def test_micro_batches_on_a_mesh_equal_micro_batches_on_one_device(found):
    one, eight = found["in_parts"]["1x1"], found["in_parts"]["2x4"]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)


def test_parameters_and_their_moments_are_split_over_device_alone(found):
    shards = {mesh: found["meshes"][mesh]["moment_shard"] for mesh in EIGHT}
    assert {mesh: np.prod(shard) for mesh, shard in shards.items()} == {
        "1x8": 64 * 64 // 8,
        "2x4": 64 * 64 // 4,
        "8x1": 64 * 64,
    }
    assert "device" in found["meshes"]["2x4"]["kernel"]
    assert all(found["meshes"][mesh]["laid_out_as_planned"] for mesh in EIGHT)


@pytest.mark.parametrize("mesh", EIGHT)
def test_batches_are_split_over_all_devices(found, mesh):
    assert found["meshes"][mesh]["batch_shard"] == [2, 8]


def test_a_killed_run_on_eight_devices_continues_bit_for_bit(found):
    whole, copy = found["same_mesh"]["curves"]
    assert copy == whole and len(copy) == 20
    assert found["same_mesh"]["same_weights"]


def test_a_run_continued_on_another_mesh_goes_the_same_way(found):
    whole, copy = np.array(found["other_mesh"]["curves"])
    np.testing.assert_array_equal(copy[:10], whole[:10])
    np.testing.assert_allclose(copy[10:], whole[10:], rtol=1e-5)


def test_a_checkpoint_holds_the_same_weights_on_every_mesh(found):
    assert found["weights_move"] is True


def test_a_batch_that_does_not_fit_the_devices_is_refused_once_they_are_known(found):
    assert "batch_size=12 does not split into micro_batches=1 x 8 devices" in found["refusal"]


def test_nothing_is_complained_about(found):
    noise = [line for line in found["stderr"].splitlines() if "warn" in line.lower()]
    assert noise == []
