"""Two real processes start from published weights as one does: each places its own shards."""

import jax
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.weights import families
from tests.multiprocess import launcher, reference
from tests.train import runs, toy_config, toy_weights
from train.loop import train
from train.trained import open_run

pytestmark = pytest.mark.slow

SETTINGS = {"total_steps": 3, "optimizer.warmup_steps": 1, "model.frozen": "embedding"}
FLAGS = (
    "--config=tests/train/toy_config.py:quickstart",
    *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
    "--config.distributed.heartbeat_seconds=10",
)
PUBLISHED = ("-m", "tests.multiprocess.published", *FLAGS)
# Each kernel is split over the devices of both processes.
MESH = ("--config.mesh.node=1", "--config.mesh.device=4")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same weights as they are published, and converted."""
    folder = tmp_path_factory.mktemp("published")
    toy_weights.publish(folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "known_families", lambda: {"toy": toy_weights.FAMILY})
        weights.convert(folder / "model.safetensors", folder / "converted")
    return {"file": folder / "model.safetensors", "converted": folder / "converted"}


@pytest.fixture(scope="module")
def one(places, tmp_path_factory):
    """The run in this process, on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    settings = {name.replace(".", "__"): value for name, value in SETTINGS.items()}
    config = runs.config(**settings, init_from=str(places["converted"]))
    train(config, workdir, toy_config.FIELDS)
    return workdir


@pytest.mark.parametrize("kind", ["file", pytest.param("converted", marks=pytest.mark.long)])
def test_two_processes_start_from_published_weights_as_one(kind, places, one, tmp_path):
    flags = (*MESH, f"--config.init_from={places[kind]}", f"--workdir={tmp_path}/run")
    group = launcher.run(2, tmp_path, *PUBLISHED, *flags, devices=2, **reference.CACHE)
    assert "(toy): 3 parameters at the root" in group[0].text
    assert "init_from" not in group[1].text
    found, wanted = runs.curve(tmp_path / "run"), runs.curve(one)
    assert list(found) == list(wanted) == [1, 2, 3]
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    found, wanted = (
        params_lib.flatten(jax.device_get(open_run(w, overrides={"mesh.device": "1"}).params))
        for w in (tmp_path / "run", one)
    )
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    # What no step changes is still what was published, bit for bit.
    published = weights.read(places["file"])["wte.weight"]
    np.testing.assert_array_equal(found["embedding/table"], published)


@pytest.mark.long
def test_processes_that_have_other_weights_under_one_name_are_refused(tmp_path):
    homes = [tmp_path / "0", tmp_path / "1"]
    for home, dtype in zip(homes, (np.float32, np.float16), strict=True):
        home.mkdir()
        toy_weights.publish(home / "model.safetensors", dtype)
    flags = ("--config.init_from=~/model.safetensors", f"--workdir={tmp_path}/run")
    extra = {index: [f"--home={home}"] for index, home in enumerate(homes)}
    with launcher.started(2, tmp_path, *PUBLISHED, *flags, extra=extra) as group:
        assert group.wait() == [2, 2], group.logs()
    for process in group.processes:
        assert "init_from.weights is " in process.error and "on process 1" in process.error
        assert "Traceback" not in process.text
