"""The command line: every wrong use is one line and status 2, before jax is even imported."""

import importlib
import json
import time

import pytest

from tests.train import runs
from train import cli, evaluate, main, predict

TOY = "--config=tests/train/toy_config.py"


def leave(command, *argv):
    """Runs a command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as left:
        cli.run(lambda _: command(argv))
    return left.value.code


def refused(capsys, command, *argv):
    """Runs a command that must be refused; returns the one line it printed."""
    assert leave(command, *argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--config is missing"),
        (["--config=configs/vc.py:quickstart"], "--config=configs/vc.py: no such file"),
        (["--config=README.md", "--workdir=w"], "README.md"),
        ([TOY + ":quikstart"], "unknown preset 'quikstart'; nearest: quickstart"),
        ([TOY], "--workdir is missing"),
        ([TOY, "--wrokdir=w"], "unknown flag --wrokdir; nearest: --workdir"),
        ([TOY, "--workdir"], "workdir"),
        ([TOY, "stray"], "unexpected argument 'stray'"),
        ([TOY, "--config.sed=1"], "unknown field 'config.sed'; nearest: config.seed"),
        ([TOY, "--config.optimizer.lr=1"], "nearest: config.optimizer.learning_rate"),
        ([TOY, "--config.total_steps=-1"], "total_steps=-1: accepted is int, > 0"),
        ([TOY, "--config.total_steps=1e3"], "total_steps=1e3: accepted is int"),
        ([TOY, "--config.model.width=wide"], "model.width=wide: accepted is int"),
        ([TOY, "--config.optimizer.name=adamm"], "accepted is adamw | adam | sgd"),
        (
            [TOY, "--config.optimizer.end_ratio=2"],
            "optimizer.end_ratio=2: accepted is float, 0 to 1",
        ),
        ([TOY, "--config.seed"], "--config.seed has no value"),
        ([TOY, "--config.seed", "--workdir=w"], "--config.seed has no value"),
        ([TOY, "--config.micro_batches=3"], "batch_size=16 does not split into micro_batches=3"),
        ([TOY, "--config.mesh.node=3", "--config.mesh.device=2"], "x 6 devices; nearest: 12 or 18"),
        ([TOY, "--config.optimizer.warmup_steps=21"], "at most total_steps=20"),
        ([TOY, "--config.method=os.system;x"], "method=os.system;x"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(capsys, argv, said):
    assert said in refused(capsys, main.main, *argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config.method=vca"], "unknown method 'vca'"),
        (["--config.method=tests.train.nothing"], "looked for the module tests.train.nothing"),
        (["--config.method=tests.train.runs"], "has no make_task"),
        (["--config.model.width=13"], "model.width=13 is not a multiple of 2; choose 12 or 14"),
        (["--config.mesh.node=3"], "mesh.node=3 does not divide the 1 devices"),
        (["--config.mesh.node=2", "--config.mesh.device=2"], "1 devices"),
        (["--config.warm_start=/nowhere"], "warm_start=/nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_compiling(capsys, tmp_path, argv, said):
    workdir = tmp_path / "run"
    line = refused(capsys, main.main, TOY, f"--workdir={workdir}", *argv)
    assert said in line
    assert not (workdir / "config.json").exists()  # the next try is not held to the wrong one


def test_a_workdir_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--workdir" in refused(capsys, main.main, TOY, f"--workdir={tmp_path}/file/run")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x =", "SyntaxError"),
        ("raise OSError('two\\nlines')", "OSError: two lines"),
        ("FIELDS = {}", "defines no get_config"),
    ],
)
def test_a_broken_config_file_is_one_line(capsys, tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert said in refused(capsys, main.main, f"--config={path}", "--workdir=w")


def test_config_files_are_found_from_anywhere_and_shadow_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text((runs.ROOT / "tests/train/toy_config.py").read_text())
    config, _ = cli.read_config("json.py:quickstart", {})
    assert config.method == "tests.train.toy"
    config, _ = cli.read_config("tests/train/toy_config.py", {"model.width": "8"})
    assert config.model.width == 8
    assert json.dumps([1]) == "[1]"


def test_overrides_take_both_forms_and_the_last_one_wins():
    flags = (cli.Flag("workdir", "x"), cli.Flag("dry", "y", False))
    argv = ["--config.a.b=1", "--workdir=w", "--config.a.b", "-2", "--dry", "-config.c=x=y"]
    command = cli.parse(argv, flags, "usage")
    assert command.overrides == {"a.b": "-2", "c": "x=y"}
    assert command.flags == {"workdir": "w", "dry": True}


PRESETS = [
    f"configs/{path.name}:{preset}"
    for path in sorted((runs.ROOT / "configs").glob("*.py"))
    for preset in getattr(importlib.import_module(f"configs.{path.stem}"), "PRESETS", ())
]


@pytest.mark.parametrize("spec", PRESETS)
def test_every_preset_is_accepted_as_it_stands(spec):
    config, _ = cli.read_config(spec, {})
    cli.check_sizes(config, 1)


def test_print_config_lists_every_field(capsys):
    assert leave(main.main, TOY, "--print_config", "--config.optimizer.b2=0.5") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    _, fields = cli.read_config("tests/train/toy_config.py", {})
    assert set(fields) <= rows.keys()
    assert rows["optimizer.b2"].split()[1:4] == ["float", "0.5", "0.98"]
    assert all(field.meaning in rows[name] for name, field in fields.items())


def test_help_names_every_flag(capsys):
    for command in (main, evaluate, predict):
        assert leave(command.main, "--help") == 0
        text = capsys.readouterr().out
        assert text.startswith("usage: python -m train.")
        assert all(f"--{flag.name}" in text for flag in command.FLAGS)


@pytest.mark.parametrize(
    ("command", "argv", "said"),
    [
        (evaluate, [], "--workdir is missing"),
        (evaluate, ["--workdir={here}"], "no config.json there"),
        (evaluate, ["--workdir={here}", "--step=last"], "--step=last: accepted is a whole number"),
        (predict, ["--workdir={here}"], "--input is missing"),
        (
            predict,
            ["--workdir={here}", "--input={here}/no", "--output=o"],
            "cannot be read: No such",
        ),
        (predict, ["--workdir={here}", "--input={here}/bad", "--output=o"], "line 3: not JSON"),
        (
            predict,
            ["--workdir={here}", "--input={here}/list", "--output=o"],
            "line 1: [1] is not an",
        ),
        (predict, ["--workdir={here}", "--input={here}/none", "--output=o"], "no line in it"),
        (
            predict,
            ["--workdir={here}", "--input={here}/ok", "--output=/no/o"],
            "/no does not exist",
        ),
        (predict, ["--workdir={here}", "--input={here}/ok", "--output={here}/o"], "no config.json"),
    ],
)
def test_wrong_uses_of_evaluate_and_predict_are_one_line(capsys, tmp_path, command, argv, said):
    contents = {"bad": '{"a": 1}\n\n{"a": \n', "list": "[1]\n", "none": "\n", "ok": '{"a": 1}\n'}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    argv = [word.format(here=tmp_path) for word in argv]
    assert said in refused(capsys, command.main, *argv)


def test_the_real_command_refuses_in_a_second_without_jax():
    script = (
        "import sys; from train import cli, main\n"
        f"sys.argv = ['main', '{TOY}', '--workdir=w', '--config.total_steps=0']\n"
        "try: cli.run(main.main)\n"
        "finally: print('jax' in sys.modules, 'orbax' in sys.modules)"
    )
    start = time.perf_counter()
    done = runs.python("-c", script)
    assert done.returncode == 2 and done.stdout == "False False\n"
    assert done.stderr == "error: total_steps=0: accepted is int, > 0 (optimiser steps in all)\n"
    assert time.perf_counter() - start < 5  # half a second on an idle machine
