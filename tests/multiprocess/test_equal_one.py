"""Two and four real processes do what one does: the same curve, weights, evaluation and files."""

import json

import jax
import numpy as np
import pytest

from jaxmodels.core import params as params_lib
from tests.multiprocess import launcher, reference, weights
from tests.train import runs, toy_config
from train import evaluate
from train.loop import train
from train.trained import open_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same run in this process, on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    train(runs.config(**reference.SETTINGS), workdir, toy_config.FIELDS)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return reference.two(tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return launcher.run(4, folder, *reference.TRAIN, f"--workdir={folder}/run", **reference.CACHE)


@pytest.fixture(scope="module")
def groups(two, four):
    return {"two": two, "four": four}


@pytest.mark.parametrize("count", ["two", "four"])
def test_the_curves_are_those_of_one_process(count, groups, one):
    workdir = reference.workdir(groups[count])
    found, wanted = runs.curve(workdir), runs.curve(one)
    assert list(found) == list(wanted) == list(range(1, 21))
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    found, wanted = (
        [[r[n] for n in ("step", "loss", "accuracy")] for r in runs.lines(w, "valid")]
        for w in (workdir, one)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("count", ["two", "four"])
def test_the_weights_are_those_of_one_process(count, groups, one):
    found, wanted = (
        params_lib.flatten(jax.device_get(open_run(w).params))
        for w in (reference.workdir(groups[count]), one)
    )
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("count", ["two", "four"])
def test_process_0_alone_writes_and_talks(count, groups, one):
    group, workdir = groups[count], reference.workdir(groups[count])
    files = {p.name for p in workdir.iterdir()}
    assert files == {p.name for p in one.iterdir()}
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    records = (workdir / "metrics.jsonl").read_text().splitlines()
    assert (
        len(records)
        == len(set(records))
        == len((one / "metrics.jsonl").read_text().split("\n")) - 1
    )
    assert runs.steps_saved(workdir) == [6, 12, 18, 20]
    number = len(group.processes)
    assert f"{number} processes joined at 127.0.0.1:" in group[0].text
    assert "counts as dead" in group[0].text and "resume the run" in group[0].text
    for process in group.processes[1:]:
        said = [line for line in process.text.splitlines() if line and "Gloo" not in line]
        assert said == []


def test_f13_evaluation_and_weights_on_another_mesh_of_two_processes(two, one, tmp_path):
    workdir = reference.copy_until(12, reference.workdir(two), tmp_path / "run")
    flags = (f"--workdir={workdir}", "--step=12")
    script = ("-m", "tests.multiprocess.weights", *flags)
    group = launcher.run(2, tmp_path, *script, devices=2, **reference.CACHE)
    together = json.loads((workdir / "evaluation.json").read_text())
    assert together["step"] == 12
    evaluate.main(list(flags))
    alone = json.loads((workdir / "evaluation.json").read_text())
    for metric in ("loss", "accuracy"):
        found = together["results"]["valid"][metric]
        assert found == pytest.approx(alone["results"]["valid"][metric], rel=1e-6)
    wanted = weights.digests(open_run(workdir, 12).params)
    for process in group.processes:  # the same bits
        line = next(t for t in process.text.splitlines() if t.startswith('{"digests"'))
        assert json.loads(line)["digests"] == wanted


def test_f13_two_processes_continue_as_one(two, tmp_path):
    whole = reference.workdir(two)
    workdir = reference.copy_until(12, whole, tmp_path / "run")
    train(runs.config(**reference.SETTINGS), workdir, toy_config.FIELDS)
    found, wanted = runs.curve(workdir), runs.curve(whole)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


def test_f13_one_process_continues_as_two_on_a_mesh_of_four(one, tmp_path):
    workdir = reference.copy_until(12, one, tmp_path / "run")
    shape = ("--config.mesh.node=1", "--config.mesh.device=4", f"--workdir={workdir}")
    group = launcher.run(2, tmp_path, *reference.TRAIN, *shape, devices=2, **reference.CACHE)
    assert "continuing from step 12" in group[0].text
    found, wanted = runs.curve(workdir), runs.curve(one)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
