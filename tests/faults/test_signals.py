"""Faults F1-F4: signals at awkward moments; the same command goes on as if nothing had been."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from jaxmodels.core import params as params_lib
from tests.faults import interrupted
from tests.train import runs, toy_config
from train import metrics
from train.checkpoint import Checkpoints
from train.compiled import PerShape
from train.loop import train
from train.trained import open_run

SETTINGS = {"checkpoint_every": 6, "eval_every": 8, "micro_batches": 2}
FLAGS = [
    "--config=tests/train/toy_config.py:quickstart",
    *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(runs.config(**SETTINGS), workdir, toy_config.FIELDS)
    return workdir


def check_same(workdir, whole):
    """Losses, evaluations and weights are those of the run never stopped, bit by bit."""
    assert runs.curve(workdir) == runs.curve(whole)
    names = ("step", "loss", "accuracy")
    valid = [
        [[r[name] for name in names] for r in runs.lines(w, "valid")] for w in (workdir, whole)
    ]
    assert valid[0] == valid[1]
    one, other = (params_lib.flatten(jax.device_get(open_run(w).params)) for w in (workdir, whole))
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def term():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("owner", "name", "number", "step"),
    [
        (PerShape, "__call__", 4, 4),  # in the middle of a step
        (PerShape, "prepare", 1, 1),  # while it compiles: the step is made, so it is kept
        (metrics, "add", 1, 8),  # in an evaluation: it is owed
        (Checkpoints, "save", 1, 6),  # while a checkpoint is written
    ],
)
def test_f01_sigterm_finishes_the_step_saves_and_continues_bit_for_bit(
    owner, name, number, step, whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    interrupted.after(owner, name, number, term)
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (stopped.stopped_by, stopped.step) == ("SIGTERM", step)
    said = capsys.readouterr().out
    assert f"SIGTERM: stopping at step {step}" in said and f"stopped at step {step} after" in said
    assert step in runs.steps_saved(tmp_path)
    monkeypatch.undo()
    assert train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS).stopped_by is None
    check_same(tmp_path, whole)


def test_f01_a_signal_during_the_last_evaluation_leaves_it_owed(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(metrics, "add", metrics.add)
    interrupted.after(metrics, "add", 7, term)  # 2 batches and a rest at 8 and 16: the 7th is at 20
    stopped = train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    assert (stopped.stopped_by, stopped.step, stopped.results) == ("SIGTERM", 20, {})
    monkeypatch.undo()
    finished = train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    assert finished.results["valid"] and finished.stopped_by is None
    check_same(tmp_path, whole)
    capsys.readouterr()
    assert train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS).results == {}
    assert "finished already at step 20" in capsys.readouterr().out


def interrupt(workdir, moment, name):
    return runs.python(
        "-m", "tests.faults.interrupted", moment, name, *FLAGS, f"--workdir={workdir}"
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f01_the_command_exits_with_143(name, whole, tmp_path):
    found = interrupt(tmp_path, "step:5", name)
    assert found.returncode == 143, found.stderr
    assert f"{name}: stopping at step 5" in found.stdout
    assert found.stderr.strip() == ""
    train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    check_same(tmp_path, whole)


def test_f03_a_second_signal_during_the_save_leaves_at_once_without_harm(whole, tmp_path, capsys):
    found = interrupt(tmp_path, "twice:2", "SIGTERM")
    assert found.returncode == 143
    assert "second signal (SIGTERM): leaving at once" in found.stderr
    assert [s for s in runs.steps_saved(tmp_path) if runs.is_whole(tmp_path, s)] == [6]
    train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    assert "continuing from step 6" in capsys.readouterr().out
    check_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "resumed"), [("step:9", 6), ("save:2", 6), ("evaluate:4", 12)])
def test_f04_sigkill_resumes_from_the_last_whole_step(moment, resumed, whole, tmp_path, capsys):
    found = interrupt(tmp_path, moment, "SIGKILL")
    assert found.returncode == -signal.SIGKILL
    train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    assert f"continuing from step {resumed}" in capsys.readouterr().out
    check_same(tmp_path, whole)


def test_a_library_call_outside_the_main_thread_takes_no_signals(whole, tmp_path):
    import threading

    ends = []
    thread = threading.Thread(
        target=lambda: ends.append(train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS))
    )
    thread.start()
    thread.join()
    assert ends[0].step == 20
    check_same(tmp_path, whole)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f01_before_and_after_the_training_a_signal_leaves_at_once_with_143(name):
    script = (
        "import os, signal\nfrom train import cli\n"
        f"cli.run(lambda arguments: os.kill(os.getpid(), signal.{name}))"
    )
    found = runs.python("-c", script)
    assert (found.returncode, found.stderr) == (143, f"stopped by {name}\n")


def test_f01_a_signal_while_python_ends_changes_no_status():
    script = (
        "import atexit, os, signal\nfrom train import cli\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\ncli.run(print)"
    )
    found = runs.python("-c", script)
    assert (found.returncode, found.stderr) == (0, "")
