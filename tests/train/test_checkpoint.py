"""Checkpoints that nothing happens to: exact, kept as asked, read by others."""

import json
import math
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import pytest

from tests.train import checkpoint_cases as cases
from train.checkpoint import Checkpoints, find, load_params, manifest
from train.checkpoint.folder import Retention
from train.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    """A workdir with steps 1 to 3, and frozen parameters."""
    workdir = tmp_path_factory.mktemp("run")
    cases.run(workdir, range(1, 4), parts={"frozen": cases.frozen()})
    return workdir


def test_a_state_comes_back_bit_for_bit_with_its_progress(tmp_path):
    progress = {"position": {"next": [3, None]}, "seconds": 0.1 + 0.2, "loss": math.inf}
    with Checkpoints(tmp_path) as saved:
        assert saved.restore(cases.plan(cases.state(9))) is None
        assert saved.latest_step() is None and saved.steps() == []
        saved.save(9, cases.state(9), progress)
        assert saved.wait() is None and saved.latest_step() == 9
        found = saved.restore(cases.plan(cases.state()))
    assert (found.step, found.progress) == (9, progress)
    cases.assert_same(found.state, cases.state(9))


def test_opening_and_restoring_write_nothing(tmp_path):
    with Checkpoints(tmp_path / "run") as saved:
        assert saved.restore(cases.plan(cases.state())) is None
        assert saved.poll() is None and saved.wait() is None
    assert cases.names(tmp_path) == []


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    big = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    wanted = cases.state(1, trainable=jax.tree.map(jnp.copy, big))
    with Checkpoints(tmp_path) as saved:
        saved.save(1, cases.state(1, trainable=big), {})
        for _ in range(5):
            big = jax.block_until_ready(overwrite(big))
        saved.wait()
        cases.assert_same(saved.restore(cases.plan(wanted)).state, wanted)


def test_a_complete_step_is_not_written_again(tmp_path):
    folder = cases.run(tmp_path, range(1, 2))
    before = (folder / "1" / manifest.NAME).read_bytes()
    cases.run(tmp_path, range(1, 2))
    assert (folder / "1" / manifest.NAME).read_bytes() == before


def test_frozen_parameters_are_written_once_and_belong_to_every_step(run_of_three, tmp_path):
    folder = run_of_three / "checkpoints"
    assert cases.names(folder) == ["1", "2", "3", "frozen"]
    assert not any((folder / step / "frozen").exists() for step in "123")
    wanted = cases.state(3, frozen=cases.frozen())
    folder = shutil.copytree(folder, tmp_path / "checkpoints")
    written = (folder / "frozen" / manifest.NAME).stat().st_mtime_ns
    with Checkpoints(tmp_path, keep=4) as saved:
        found = saved.restore(cases.plan(wanted))
        cases.assert_same(found.state, wanted)
        saved.save(4, cases.state(4, frozen=found.state.frozen), {})
    assert (folder / "frozen" / manifest.NAME).stat().st_mtime_ns == written
    assert manifest.read(folder / "4").facts["frozen"] == manifest.read(folder / "frozen").digest


def test_another_start_does_not_write_over_the_frozen_parameters_of_steps(run_of_three):
    with Checkpoints(run_of_three) as saved:
        with pytest.raises(CheckpointError, match="steps of another start"):
            saved.save(7, cases.state(7, frozen=cases.frozen()), {})


def test_no_frozen_parameters_no_folder(tmp_path):
    assert cases.names(cases.run(tmp_path, range(1, 2))) == ["1"]


def test_weights_alone_are_read_from_the_workdir_its_folder_or_one_step(run_of_three):
    params = cases.plan(cases.state(1, frozen=cases.frozen())).abstract.params
    for path, step, wanted in (
        (run_of_three, None, 3),
        (run_of_three / "checkpoints", 2, 2),
        (run_of_three / "checkpoints" / "1", None, 1),
    ):
        found, number = load_params(path, params, step)
        assert number == wanted
        want = cases.state(wanted, frozen=cases.frozen()).params
        assert jax.tree.map(cases.bits, found) == jax.tree.map(cases.bits, want)
    with pytest.raises(UsageError, match=r"no checkpoint of step 8; there are \[1, 2, 3"):
        load_params(run_of_three, params, 8)
    with pytest.raises(UsageError, match="no checkpoint there"):
        find(run_of_three / "nowhere")


def test_the_newest_and_the_best_are_kept(tmp_path):
    metrics = {1: 0.5, 2: 0.9, 3: math.nan, 4: 0.7, 5: None, 6: 0.1, 7: math.inf, 8: 0.2}
    with Checkpoints(tmp_path, keep=2, keep_best=2, best_metric="accuracy") as saved:
        for step, metric in metrics.items():
            saved.save(step, cases.state(step), {}, metric)
            saved.wait()
        assert saved.steps() == [2, 4, 7, 8]
    with Checkpoints(tmp_path, keep=1, keep_best=1, best_metric="accuracy") as saved:  # reads them
        saved.save(9, cases.state(9), {}, 0.8)
        saved.wait()
        assert saved.steps() == [2, 9]
    with Checkpoints(tmp_path, keep=1, keep_best=1, best_metric="loss", best_mode="min") as saved:
        saved.save(10, cases.state(10), {}, 0.3)
        saved.wait()
        assert saved.steps() == [10]  # the values of another metric do not count


def test_the_best_may_be_the_smallest_and_the_later_of_two_equal_ones():
    smallest = Retention(1, 2, "loss", "min")
    assert smallest.stays({1: 0.3, 2: 0.1, 3: 0.1, 4: 0.1, 5: math.nan}) == {3, 4, 5}
    assert Retention(2).stays({1: 1.0, 2: 2.0, 3: 3.0}) == {2, 3}
    with pytest.raises(ValueError, match="keep >= 1"):
        Retention(0)


def test_a_step_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    said = []
    with Checkpoints(tmp_path, keep=1, say=said.append) as saved:

        def refuse(step):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(saved._folder, "delete", refuse)
        for step in (1, 2):
            saved.save(step, cases.state(step), {})
            assert saved.wait() is None
        assert saved.steps() == [1, 2]
    assert len(said) == 1 and "checkpoint 1 could not be deleted: PermissionError" in said[0]


def test_the_manifest_names_every_file_and_leaf(run_of_three):
    place = run_of_three / "checkpoints" / "2"
    found = manifest.read(place)
    here = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert found.files.keys() == here - {manifest.NAME}
    assert found.facts["items"]["params"]["leaves"] == {
        "layer/kernel": "float32[20,30]",
        "layer/bias": "bfloat16[30]",
    }
    assert found.facts["items"]["training"]["leaves"]["rng"] == "key<fry>[]"


def test_progress_that_is_not_json_is_an_error_at_once(tmp_path):
    with Checkpoints(tmp_path) as saved, pytest.raises(TypeError, match="not JSON serializable"):
        saved.save(1, cases.state(1), {"position": object()})


def test_a_newer_format_is_refused_and_left_alone(tmp_path):
    folder = cases.run(tmp_path, range(1, 3))
    path = folder / "2" / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with Checkpoints(tmp_path) as saved, pytest.raises(UsageError, match="format 2.* reads 1"):
        saved.restore(cases.plan(cases.state()))
    assert cases.names(folder) == ["1", "2"]


def many_saves(workdir, count):
    """Saves that often; the steps left, threads and open files added."""
    with Checkpoints(workdir, keep=2) as saved:
        for step in range(1, count + 1):
            saved.save(step, cases.state(step), {"position": step})
            saved.wait()
            if step == 5:
                threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        grown = threading.active_count() - threads, len(os.listdir("/proc/self/fd")) - files
        found = saved.restore(cases.plan(cases.state()))
    cases.assert_same(found.state, cases.state(count))
    return cases.names(workdir / "checkpoints"), *grown


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_f43_a_thousand_tiny_saves_leave_nothing_behind(tmp_path, count):
    left, threads, files = many_saves(tmp_path, count)
    assert sorted(map(int, left)) == [count - 1, count]
    assert threads <= 4 and files <= 8
