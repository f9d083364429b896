"""Faults of checkpoints: kills at every stage, damage of every kind, storage that fails."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from tests.faults.checkpoint_script import POINTS
from tests.train import checkpoint_cases as cases
from train.checkpoint import Checkpoints, checkpoints, load_params, manifest
from train.checkpoint import folder as folder_lib
from train.errors import CheckpointError, UsageError

ROOT = pathlib.Path(__file__).parents[2]


def start(*arguments, prefix=()):
    command = [
        *prefix,
        sys.executable,
        "-m",
        "tests.faults.checkpoint_script",
        *map(str, arguments),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder of workdirs, each named by the point at which its run was killed."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(folder, "kills")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_f04_a_kill_during_a_save_or_a_deletion_loses_no_complete_step(killed, point):
    workdir, said = killed / point, []
    with Checkpoints(workdir, keep=2, say=said.append) as saved:
        parts = {"frozen": cases.frozen()} if POINTS[point] is None else {}
        found = saved.restore(cases.plan(cases.state(**parts)))
        assert (found and found.step) == POINTS[point]
        if found:
            cases.assert_same(found.state, cases.state(found.step))
        following = found.step + 1 if found else 1
        saved.save(following, cases.state(following, **parts), {})
        assert saved.wait() is None
    kept = {str(step) for step in saved.steps()} | ({"frozen"} if parts else set())
    assert str(following) in kept
    assert set(cases.names(workdir / "checkpoints")) == kept  # no left-over, nothing moved aside
    assert not any("damaged" in line for line in said)


def test_f05_a_kill_between_arrays_and_manifest_is_passed_over_then_swept(tmp_path):
    workdir, said = tmp_path / "run", []
    with Checkpoints(workdir) as saved:
        for step in (1, 2):
            saved.save(step, cases.state(step), {})
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "3")
    (workdir / "checkpoints" / "3" / manifest.NAME).unlink()
    (workdir / "checkpoints" / "3.unfinished").touch()
    shutil.copytree(
        workdir / "checkpoints" / "2", workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    )
    with Checkpoints(workdir, say=said.append) as saved:
        assert saved.restore(cases.plan(cases.state())).step == 2
        assert said == ["checkpoint 3 was not finished when the run ended: passed over"]
        saved.save(3, cases.state(3), {})
        saved.wait()
    assert cases.names(workdir / "checkpoints") == ["1", "2", "3"]
    assert load_params(workdir, cases.plan(cases.state()).abstract.params)[1] == 3


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    cases.run(workdir, range(1, 3))
    return workdir


def some_array_file(step):
    return max(
        (p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def emptied(step):
    shutil.rmtree(step)
    step.mkdir()


def item_removed(step):
    shutil.rmtree(step / "params")


def cut(step):
    path = some_array_file(step)
    path.write_bytes(path.read_bytes()[:-7])


def file_removed(step):
    some_array_file(step).unlink()


def bad_json(step):
    path = step / manifest.NAME
    path.write_text(path.read_text()[:-2])


def no_manifest(step):
    (step / manifest.NAME).unlink()


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def is_set_aside(source, folder, harm, reason):
    """Harms step 2 of a copy of `source`; step 1 must be used, and step 2 be kept and named."""
    workdir, said = folder / "run", []
    shutil.copytree(source, workdir)
    checkpoints = workdir / "checkpoints"
    harm(checkpoints / "2")
    remains = sorted(str(p.relative_to(checkpoints / "2")) for p in (checkpoints / "2").rglob("*"))
    with Checkpoints(workdir, say=said.append) as saved:
        found = saved.restore(cases.plan(cases.state()))
        assert found.step == 1 and found.progress == {"position": {"next": 1}}
        cases.assert_same(found.state, cases.state(1))
        assert len(said) == 1 and "\n" not in said[0]
        assert said[0].startswith("checkpoint 2 is damaged: ") and reason in said[0]
        assert f"moved to {checkpoints}/damaged/2" in said[0]
        aside = checkpoints / "damaged" / "2"
        there = sorted(str(p.relative_to(aside)) for p in aside.rglob("*"))
        assert there == remains
        saved.save(2, cases.state(2), {})
        assert saved.wait() is None
        cases.assert_same(saved.restore(cases.plan(cases.state())).state, cases.state(2))
        harm(checkpoints / "2")  # once more: neither is lost
        assert saved.restore(cases.plan(cases.state())).step == 1
    assert cases.names(checkpoints / "damaged") == ["2", "2.1", "2.1.txt", "2.txt"]


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (emptied, "manifest.json is missing"),
        (item_removed, "params/"),
        (cut, "bytes of"),
        (file_removed, "is missing"),
        (bad_json, "manifest.json is not a manifest"),
        (no_manifest, "manifest.json is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_f06_a_damaged_newest_step_is_named_and_moved_aside(two_steps, tmp_path, harm, reason):
    is_set_aside(two_steps, tmp_path, harm, reason)


@pytest.mark.parametrize("item", ["params", "training", "progress", manifest.NAME])
def test_f07_one_flipped_byte_is_found_in(two_steps, tmp_path, item):
    def harm(step):
        path = step / item
        flipped(path if path.is_file() else largest(path))

    is_set_aside(two_steps, tmp_path, harm, item)


def test_f07_readers_of_weights_find_it_too_and_move_nothing(two_steps, tmp_path, capsys):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    params = cases.plan(cases.state()).abstract.params
    flipped(largest(workdir / "checkpoints" / "2" / "training"))
    assert load_params(workdir, params)[1] == 2  # the weights are whole
    flipped(largest(workdir / "checkpoints" / "2" / "params"))
    assert load_params(workdir, params)[1] == 1
    assert "is damaged: params/" in (said := capsys.readouterr().out) and "checkpoint 1" in said
    for path, step in ((workdir, 2), (workdir / "checkpoints" / "2", None)):
        with pytest.raises(CheckpointError, match=r"checkpoint 2 .*SHA-256"):
            load_params(path, params, step)
    assert cases.names(workdir / "checkpoints") == ["1", "2"]


def test_f08_when_every_step_is_damaged_the_run_stops_and_stays_stopped(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    cut(workdir / "checkpoints" / "1")
    no_manifest(workdir / "checkpoints" / "2")
    for _ in range(2):  # a rerun does not begin at 0 either
        with Checkpoints(workdir, say=lambda text: None) as saved:
            with pytest.raises(CheckpointError) as error:
                saved.restore(cases.plan(cases.state()))
        text = str(error.value)
        assert "1: params/" in text and "2: manifest.json is missing" in text
        assert "start from step 0" in text and "\n" not in text
    assert cases.names(workdir / "checkpoints" / "damaged") == ["1", "1.txt", "2", "2.txt"]


def test_f08_damaged_frozen_parameters_stop_the_run_and_no_step_is_moved(tmp_path):
    parts = {"frozen": cases.frozen()}
    folder = cases.run(tmp_path, range(1, 3), parts=parts)
    flipped(largest(folder / "frozen"))
    for _ in range(2):
        with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match="frozen param"):
            saved.restore(cases.plan(cases.state(**parts)))
    assert cases.names(folder) == ["1", "2", "frozen"]


def test_storage_that_cannot_be_read_is_not_taken_for_damage(two_steps, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "_hash", refuse)
    with Checkpoints(two_steps) as saved:
        with pytest.raises(CheckpointError, match="checkpoint 2 .*cannot be read: PermissionError"):
            saved.restore(cases.plan(cases.state()))
    assert cases.names(two_steps / "checkpoints") == ["1", "2"]


def told(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors[-3000:]
    assert "Traceback" not in errors and "ERROR" not in errors, errors[-3000:]
    return output.splitlines()


def check_story(lines, first, then):
    """One good save, two failures, two good ones, and three failures: the last gives up."""
    assert lines[0] == "poll: None"
    assert all(line.startswith("poll: ") and first in line for line in lines[1:3]), lines
    assert lines[3:5] == ["poll: None"] * 2
    assert all(line.startswith("poll: ") and then in line for line in lines[5:7]), lines
    assert lines[7].startswith("error: checkpoint 7") and then in lines[7]
    assert lines[7].endswith("the last good one is 4")


def test_f09_failing_background_writes_are_told_retried_and_given_up(tmp_path):
    lines = told(start(tmp_path / "run", "limit"))
    check_story(lines, "File too large", "File too large")
    assert lines[8] == "steps: [1, 3, 4]"


def test_f09_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with Checkpoints(tmp_path) as saved:
        monkeypatch.setattr(folder_lib.Folder, "begin", refuse)
        for step in (1, 2):
            saved.save(step, cases.state(step), {})
            failure = "PermissionError: [Errno 13] Permission denied"
            assert saved.poll() == f"checkpoint {step} was not written: {failure}"
            assert saved.poll() is None  # told once
        with pytest.raises(CheckpointError, match=r"Permission denied; no step is saved"):
            saved.save(3, cases.state(3), {})


def test_f09_a_failure_that_nobody_asked_for_is_raised_in_the_end(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "write", refuse)
    with pytest.raises(
        CheckpointError, match="checkpoint 1 was not written: OSError.*Input/output"
    ):
        with Checkpoints(tmp_path) as saved:
            saved.save(1, cases.state(1), {})
    with pytest.raises(ZeroDivisionError):  # another error is not hidden by it
        with Checkpoints(tmp_path) as saved:
            saved.save(2, cases.state(2), {})
            raise ZeroDivisionError


def test_f10_a_full_and_a_read_only_disk_are_told_retried_and_given_up(tmp_path):
    prefix = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    process = start(tmp_path / "run", "small_disk", prefix=prefix)
    lines = told(process)
    check_story(lines, "No space left on device", "Read-only file system")
    assert lines[8] == "steps: [4]"


def test_f11_slow_storage_makes_training_wait_and_say_so(tmp_path, monkeypatch):
    waiting, real, said = threading.Event(), manifest.write, []
    at_once, most = [0], [0]

    def slow(folder, facts):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        if facts["step"] == 1:
            assert waiting.wait(60)
        try:
            return real(folder, facts)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(manifest, "write", slow)
    monkeypatch.setattr(checkpoints, "_NOTED", 0.0)
    with Checkpoints(tmp_path, say=said.append) as saved:
        saved.save(1, cases.state(1), {})
        assert saved.poll() is None and saved.steps() == []
        real_wait = saved._wait
        monkeypatch.setattr(saved, "_wait", lambda: (waiting.set(), real_wait()))
        saved.save(2, cases.state(2), {})
        assert 1 in saved.steps()
        monkeypatch.undo()
    assert most == [1] and saved.steps() == [1, 2]
    assert len(said) == 1 and said[0].startswith("training waited ")
    assert "s for checkpoint 1 to be written before saving 2" in said[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"trainable": {"layer": {"kernel": jnp.zeros((20, 30)), "more": jnp.zeros(4)}}},
            r"missing layer/more float32\[4\]; unexpected layer/bias bfloat16\[30\]",
        ),
        (
            {"trainable": {"layer": {"kernel": jnp.zeros((20, 31)), "bias": jnp.zeros(30)}}},
            r"bias is bfloat16\[30\], wanted float32\[30\]; .*kernel is float32\[20,30\], wanted "
            r"float32\[20,31\]",
        ),
        ({"opt_state": ()}, r"training is of .*unexpected opt_state/0/mu/layer/kernel float32"),
        (
            {
                "trainable": {"layer": {"kernel": jnp.zeros((20, 30))}},
                "frozen": {"layer": {"bias": jnp.zeros(30, jnp.bfloat16)}},
            },
            "params is of .*layer/bias was trained",
        ),
        (
            {"trainable": {str(i): jnp.zeros(1) for i in range(12)}},
            r"missing 7 float32\[1\]; and 4 more; continue",
        ),
        ({"rng": jax.random.key(0, impl="rbg")}, r"rng is key<fry>\[\], wanted key<rbg>\[\]"),
    ],
    ids=["leaf", "shape_and_dtype", "optimiser", "frozen_set", "many", "key"],
)
def test_f15_another_model_or_optimiser_is_refused_leaf_by_leaf(two_steps, changes, said):
    with Checkpoints(two_steps) as saved, pytest.raises(UsageError, match=said) as error:
        saved.restore(cases.plan(cases.state(**changes)))
    text = str(error.value)
    assert text.startswith("checkpoint 2 ") and "--config.warm_start=" in text and "\n" not in text
    assert cases.names(two_steps / "checkpoints") == ["1", "2"]


def test_f15_the_other_way_round_frozen_parameters_are_not_trained_silently(tmp_path):
    cases.run(tmp_path, range(1, 2), parts={"frozen": {"trunk": {"kernel": jnp.zeros(3)}}})
    now = cases.state()
    now = cases.state(trainable=now.trainable | {"trunk": {"kernel": jnp.zeros(3)}})
    with Checkpoints(tmp_path) as saved, pytest.raises(UsageError, match="kernel was frozen"):
        saved.restore(cases.plan(now))


def test_f44_a_manifest_of_this_release_is_pinned(two_steps):
    """A change of these names needs a new format number and a reader for the old one."""
    record = json.loads((two_steps / "checkpoints" / "2" / manifest.NAME).read_text())
    assert record["format"] == 1 and record.keys() == {"format", "digest", "facts", "files"}
    assert record["facts"].keys() == {"step", "metric", "items", "frozen"}
    assert record["facts"]["items"]["params"].keys() == {"leaves", "packed"}
