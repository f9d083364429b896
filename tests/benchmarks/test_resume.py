"""The benchmark that kills runs: its plan, how it tells phases, and that it sees a difference."""

import collections
import json
import os
import shutil

import pytest

from benchmarks import killed_runs, resume
from benchmarks.killed_runs import Ending, Kill, Life, phase_of
from benchmarks.resume import Outcome
from benchmarks.same_end import differences
from tests.train import runs, toy_config
from train import cli
from train.checkpoint import Checkpoints
from train.loop import train

SETTINGS = {"checkpoint_every": 6, "eval_every": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(runs.config(**SETTINGS), folder, toy_config.FIELDS)
    return folder


def lines(*texts):
    return [(float(i), text) for i, text in enumerate(texts)]


def test_a_plan_is_the_same_for_the_same_seed_and_reaches_every_phase_by_every_signal():
    kills = resume.plan(50, 3)
    assert kills == resume.plan(50, 3) != resume.plan(50, 4)
    assert {kill.wanted for kill in kills} == set(resume.WANTED)
    assert {kill.signals for kill in kills} == set(resume.SIGNALS)
    signals = collections.Counter(kill.signals[0] for kill in kills)
    assert abs(signals["SIGKILL"] - signals["SIGTERM"]) <= 6
    assert all(0 <= kill.share < 1 for kill in kills)


def test_the_flags_are_ones_that_the_command_takes():
    command = cli.parse(resume.FLAGS, [cli.Flag("config", "")], "")
    config, _ = cli.read_config(command.flags["config"], command.overrides)
    assert config.total_steps == 60 and config.data.curriculum_lengths == (64,)


STEP = "step 7/60 | loss 2.7 | "
DUE = "step 10/60 | loss 2.7 | "
STARTED = "starting from step 0"
COMPILED = "compiled the step in 1.0 s"


@pytest.mark.parametrize(
    ("said", "phase"),
    [
        ([], "start"),
        (["training vcc for 60 steps", "parameter"], "start"),
        ([STARTED], "compile"),
        (["continuing from step 14"], "compile"),
        ([STARTED, COMPILED], "steps"),
        ([STARTED, COMPILED, STEP], "steps"),
        ([STARTED, COMPILED, STEP, DUE], "evaluation"),
        ([STARTED, COMPILED, STEP, DUE, "step 10 | validation | loss 2.7"], "steps"),
        ([STARTED, COMPILED, "step 60/60 | loss 2.7 | "], "evaluation"),
        ([STARTED, COMPILED, "step 60/60 | loss | ", "step 60 | validation | l"], "end"),
        ([STARTED, COMPILED, STEP, "done at step 60"], "end"),
    ],
)
def test_the_phase_is_read_off_the_lines(said, phase, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eval_every": 10, "total_steps": 60}))
    assert phase_of(lines(*said), tmp_path) == phase


def test_a_mark_in_the_folder_is_a_save(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "6.unfinished").touch()
    assert phase_of(lines(STARTED, COMPILED, STEP), tmp_path) == "save"
    assert phase_of([], tmp_path) == "start"  # left there by the start before


def test_a_mark_of_an_earlier_start_is_no_save(tmp_path):
    mark = tmp_path / "checkpoints" / "6.unfinished"
    mark.parent.mkdir()
    mark.touch()
    before = killed_runs.marks(tmp_path)
    said = lines(STARTED, COMPILED, STEP)
    assert phase_of(said, tmp_path, before) == "steps"
    os.utime(mark, ns=(1, 1))  # the same step again
    assert phase_of(said, tmp_path, before) == "save"


@pytest.mark.parametrize(
    ("signals", "status", "phase", "promised"),
    [
        (("SIGKILL",), -9, "steps", True),
        (("SIGKILL",), 1, "steps", False),
        (("SIGTERM",), 143, "steps", True),
        (("SIGTERM",), -15, "start", True),
        (("SIGTERM",), -15, "steps", False),  # left without saving
        (("SIGTERM",), 1, "save", False),
        (("SIGTERM", "SIGKILL"), -9, "save", True),
    ],
)
def test_what_a_signal_may_end_in(signals, status, phase, promised):
    assert killed_runs.as_promised(signals, status, phase, []) is promised
    assert not killed_runs.as_promised(signals, status, phase, lines("Traceback (most ...)"))


def test_the_parts_of_a_life_are_the_times_between_its_lines():
    said = lines("training", STARTED, COMPILED, STEP, DUE, "step 10 | validation | x", "done at")
    life = killed_runs._life(said)
    assert (life.seconds, life.start, life.compile, life.evaluation) == (6.0, 1.0, 1.0, 1.0)
    assert life.steps == 1.0
    assert killed_runs.last_step(said) == 10
    assert killed_runs.last_step(lines("continuing from step 14")) == 14


def test_a_run_equals_itself_and_its_times_do_not_count(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "metrics.jsonl"
    changed = [json.loads(line) | {"step_ms": 0.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in changed))
    assert differences(whole, tmp_path / "copy") == []


def test_the_last_bit_of_a_loss_a_lost_and_a_repeated_line_are_seen(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[3]["loss"] *= 1 + 2**-24
    del records[5]
    records.append(records[0])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = differences(whole, tmp_path / "copy")
    assert len(found) == 3 and all("metrics.jsonl, step" in line for line in found)


def test_other_weights_are_seen_leaf_by_leaf(whole, tmp_path):
    train(runs.config(**SETTINGS, seed=1), tmp_path, toy_config.FIELDS)
    found = [line for line in differences(whole, tmp_path) if "metrics" not in line]
    assert any("trainable" in line and "embedding" in line for line in found)
    assert any("opt_state" in line for line in found) and any("rng" in line for line in found)


def test_a_run_without_a_checkpoint_differs(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    assert differences(whole, tmp_path / "copy")
    assert Checkpoints(whole).latest_step() == 20


def test_the_table_counts_by_phase_and_signal():
    def outcome(phase, signals, run, *found):
        return Outcome(Ending(phase, 5, 1.0, signals, -9, True), run, found)

    outcomes = [
        outcome("start", ("SIGKILL",), 1),
        outcome("save", ("SIGTERM", "SIGKILL"), 1),
        outcome("save", ("SIGKILL",), 2, "metrics.jsonl, step 3"),
    ]
    rows = [line.split() for line in resume.table(outcomes).splitlines()]
    assert rows[0] == ["killed", "in", "SIGKILL", "SIGTERM", "SIGTERM+SIGKILL", *rows[0][5:]]
    assert rows[2:] == [
        ["start", "1", "0", "0", "1", "1", "0"],
        ["save", "1", "0", "1", "2", "1", "1"],
        ["all", "2", "0", "1", "3", "2", "1"],
    ]
    made = resume.to_dict(outcomes)
    assert (made["kills"], made["equal"], made["unequal"], made["runs"]) == (3, 2, 1, 2)
    assert made["trials"][2]["differences"] == ["metrics.jsonl, step 3"]
    json.dumps(made)
    pytest.importorskip("matplotlib")
    assert len(resume.figure(outcomes).axes) == 1


TOY = (
    "--config=tests/train/toy_config.py:quickstart",
    *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
)


@pytest.mark.long
def test_killed_runs_end_like_one_never_stopped(tmp_path):
    said = []
    outcomes = resume.measure_resumes(TOY, tmp_path, trials=3, seed=1, chain=2, say=said.append)
    assert len(outcomes) == 3 and said[0].startswith("a run never stopped takes")
    assert [outcome.differences for outcome in outcomes] == [()] * 3
    assert all(outcome.ending.as_promised for outcome in outcomes)
    assert not list(tmp_path.glob("killed*"))


@pytest.mark.long
def test_a_run_that_ends_before_its_moment_is_no_trial(tmp_path):
    run = killed_runs.Run(TOY, tmp_path / "run")
    life = killed_runs.finish(run)
    assert life.seconds > life.start > 0
    assert killed_runs.trial(run, Kill("steps", 0.5, ("SIGKILL",)), life) is None
    with pytest.raises(RuntimeError, match="status 2"):
        killed_runs.finish(killed_runs.Run((*TOY, "--config.batch_size=7x"), tmp_path / "run"))
    assert isinstance(life, Life)
