"""The benchmark of the trainer's own cost: its arithmetic, its turns, what it writes."""

import json

import jax
import numpy as np
import pytest

from benchmarks import measure, overhead_loop, overhead_saves, overhead_starts, trainer_overhead
from benchmarks.overhead_loop import Blocks
from benchmarks.repeated_batch import Repeated
from configs import vcc
from tests.train import toy_config
from train import cli

TOY = toy_config.PRESETS["quickstart"]


def found():
    """Results of every part, made up."""
    one = Blocks((0.051, 0.052, 0.050), (0.050, 0.050, 0.050)).to_dict()
    starts = {
        name: {"seconds": s, "all": [s], "parts": {"imports": 3.0, "compile": s - 3.0}}
        for name, s in (("first", 20.0), ("second", 5.0))
    }
    saves = overhead_saves.Saves(150.0, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (0.2, 0.4, 0.3), 0.08)
    return {
        "loop": {"repeated": one, "real": one, "input": {"ratio": 1.04}, "summaries": []},
        "saves": saves.to_dict(),
        "starts": starts | {"ratio": 0.25},
    }


def test_ratios_are_taken_within_turns():
    blocks = Blocks((1.1, 2.4, 1.0), (1.0, 2.0, 1.0))
    made = (blocks + Blocks((1.3,), (1.0,))).to_dict()
    assert blocks.ratios == pytest.approx([1.1, 1.2, 1.0])
    assert made["turns"] == 4 and made["ratio"] == pytest.approx(1.15)
    assert made["loop_ms"] == pytest.approx(1200.0) and made["bare_ms"] == pytest.approx(1000.0)


def test_the_loop_is_timed_in_turns_and_trains_as_without(tmp_path):
    """What is timed is the real run: the same losses, each step once."""
    from tests.train import runs
    from train.loop import train

    blocks, summary = overhead_loop.measure_run(
        toy_config.FIELDS, TOY, tmp_path / "timed", turns=2, block=4
    )
    assert len(blocks.loop) == len(blocks.bare) == 2 and min(blocks.loop + blocks.bare) > 0
    assert summary.startswith("done at step 13")
    train(runs.config(total_steps=13), tmp_path / "plain", toy_config.FIELDS)
    assert runs.curve(tmp_path / "timed") == runs.curve(tmp_path / "plain")


def test_a_save_is_timed_until_it_is_on_disk(tmp_path):
    saves = overhead_saves.measure_saves(toy_config.FIELDS, TOY, tmp_path / "run", rounds=2)
    assert len(saves.held) == len(saves.on_disk) == len(saves.lost) == 2
    assert all(0 < held <= disk for held, disk in zip(saves.held, saves.on_disk, strict=True))
    assert saves.megabytes > 0 and not (tmp_path / "run").exists()


def test_a_repeated_batch_is_the_first_one():
    batches = iter(Repeated([{"x": np.arange(3)}, {"x": np.zeros(3)}]))
    assert [next(batches)["x"].tolist() for _ in range(3)] == [[0, 1, 2]] * 3


def test_the_table_judges_by_the_targets():
    text = trainer_overhead.table(found())
    assert "+2.0% (+1.0% to +3.0%), 50.0 -> 51.0 ms, 3 turns  < 3 %: met" in text
    assert "1.040x" in text and "<= 1.03x: MISSED" in text
    assert "save of 150 MB: the loop is held" in text and "200 ms" in text
    assert "20.0 s (imports 3.0, compile 17.0)" in text and "0.25x" in text


def test_parts_that_were_not_measured_are_left_out():
    part = {"saves": found()["saves"]}
    assert "start" not in trainer_overhead.table(part)
    assert len(trainer_overhead.figure(part).axes) == 1


def test_results_can_be_kept_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = measure.save("x", found(), tmp_path)
    assert json.loads(path.read_text())["loop"]["repeated"]["turns"] == 3
    assert len(trainer_overhead.figure(found()).axes) == 3


@pytest.mark.parametrize("settings", [trainer_overhead.LOOP, trainer_overhead.SAVES])
def test_the_settings_are_ones_that_the_command_takes(settings):
    command = cli.parse(trainer_overhead.flags(settings), [cli.Flag("config", "")], "")
    config, _ = cli.read_config(command.flags["config"], command.overrides)
    assert config.data.length == settings["data.length"] and config.model.d_model > 0
    assert vcc.FIELDS.keys() >= settings.keys()


def test_the_saved_state_is_large():
    from jaxmodels.core import params
    from train import devices, state
    from train.tasks import load_task

    config = trainer_overhead.config_fields.build(vcc.FIELDS, trainer_overhead.SAVES)
    mesh = devices.start(config)
    with jax.set_mesh(mesh):
        plan = state.layout(load_task(config), config, mesh)
    leaves = jax.tree.leaves((plan.abstract.trainable, plan.abstract.opt_state))
    assert 100e6 < sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) < 250e6
    assert params.count(plan.abstract.trainable) > 10e6


@pytest.mark.long
def test_a_start_is_timed_by_its_lines(tmp_path):
    flags = ["--config=tests/train/toy_config.py:quickstart", "--config.optimizer.warmup_steps=1"]
    start = overhead_starts.measure_start(flags, tmp_path / "run", tmp_path / "cache")
    assert list(start.parts) == [name for _, name in overhead_starts.MARKS]
    assert start.seconds > start.parts["imports"] > 0
    with pytest.raises(RuntimeError, match="status 2"):
        overhead_starts.measure_start(["--config=nothing.py"], tmp_path / "x", tmp_path / "cache")
