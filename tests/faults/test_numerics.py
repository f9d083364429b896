"""Faults F20-F22, F34: numbers not finite, spikes, evaluators that fail, recompilation."""

import shutil

import jax
import numpy as np
import pytest

from jaxmodels.core import params as params_lib
from jaxmodels.core.task import Evaluator
from tests.train import runs, toy, toy_config
from train import checkpoint
from train.errors import RunError, UsageError
from train.loop import train
from train.trained import open_run


def weights(workdir, step=None):
    return params_lib.flatten(jax.device_get(open_run(workdir, step).params))


FIRST_BAD = {
    "loss": r"loss is nan, the gradient of embedding/table is nan \(and 4 of 4 others\)",
    "inf": r"loss is inf, the gradient of embedding/table is nan",
    "micro": r"loss is nan, the gradient of embedding/table",
    "leaf": r"the gradient of out/bias is nan; the run stops",
}


@pytest.mark.parametrize("kind", FIRST_BAD)
def test_f20_a_number_that_is_not_finite_stops_the_run_and_is_in_no_checkpoint(
    kind, tmp_path, capsys
):
    settings = {"model__poison": kind, "model__poison_step": 6, "checkpoint_every": 3}
    config = runs.config(**settings, micro_batches=2, log_every=100)
    with pytest.raises(RunError, match=f"step 6: {FIRST_BAD[kind]}") as error:
        train(config, tmp_path, toy_config.FIELDS)
    assert "on_nonfinite=skip" in str(error.value) and "learning_rate" in str(error.value)
    assert runs.steps_saved(tmp_path) == [3]  # step 6 was due, and its loss was looked at first
    last = runs.lines(tmp_path)[-1]
    assert last["step"] == 6  # on disk although no line was due
    assert (last["loss"] is None) == (kind != "leaf")
    assert np.isfinite(np.concatenate([w.ravel() for w in weights(tmp_path).values()])).all()
    assert "failed at step" in capsys.readouterr().out  # the summary of where time went


def test_f20_one_bad_device_of_eight_is_noticed(tmp_path):
    found = runs.python(
        "-m",
        "train.main",
        "--config=tests/train/toy_config.py:quickstart",
        f"--workdir={tmp_path}/run",
        "--config.model.poison=device",
        "--config.log_every=100",
        devices=8,
    )
    assert found.returncode == 1, found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("error: step 7: loss is nan")
    assert "Traceback" not in found.stderr


def test_f20_skipping_leaves_weights_and_optimiser_as_they_were(tmp_path, capsys):
    settings = {"model__poison": "micro", "on_nonfinite": "skip", "micro_batches": 2}
    config = runs.config(**settings, total_steps=9, checkpoint_every=1, keep_checkpoints=9)
    trained = train(config, tmp_path, toy_config.FIELDS)
    assert trained.step == 9
    said = capsys.readouterr().out
    assert "step 7: loss is nan" in said and "update skipped, 1 in all" in said
    states = {step: checkpoint_arrays(tmp_path, step) for step in (6, 7, 8)}
    for path, leaf in states[6].items():
        if path not in ("step", "rng"):
            np.testing.assert_array_equal(states[7][path], leaf, err_msg=path)
    assert any((states[8][p] != leaf).any() for p, leaf in states[7].items() if p != "step")
    assert [r["step"] for r in runs.lines(tmp_path) if r["loss"] is None] == [7]


def checkpoint_arrays(workdir, step):
    """All arrays of a checkpoint, by path."""
    from jaxmodels.core import partitioning
    from train import state as state_lib
    from train.tasks import load_task

    run = open_run(workdir, step)
    mesh = partitioning.make_mesh(1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        plan = state_lib.layout(load_task(run.config), run.config, mesh)
        copy = workdir.with_name(f"{workdir.name}-at-{step}")
        shutil.copytree(workdir, copy)
        for other in runs.steps_saved(copy):
            if other > step:
                shutil.rmtree(copy / "checkpoints" / str(other))
        with checkpoint.Checkpoints(copy, keep=9) as saved:
            state = saved.restore(plan).state
    leaves = params_lib.flatten(state.trainable)
    leaves |= {
        jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def test_f20_a_run_that_skips_everything_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("train.finite._MOST_SKIPPED", 3)
    config = runs.config(skip_grad_norm=1e-9)
    with pytest.raises(RunError, match="step 3: grad_norm .*the 3th update skipped in a row"):
        train(config, tmp_path, toy_config.FIELDS)


def test_f21_a_spike_of_the_loss_is_recorded_and_training_goes_on(tmp_path, capsys):
    config = runs.config(model__poison="spike", model__poison_step=15)
    assert train(config, tmp_path, toy_config.FIELDS).step == 20
    said = [x for x in capsys.readouterr().out.splitlines() if "times the usual" in x]
    assert len(said) == 1 and said[0].startswith("step 15: loss ")


def test_f21_an_update_above_the_limit_is_skipped(tmp_path, capsys):
    settings = {"model__poison": "spike", "model__poison_step": 15, "skip_grad_norm": 20.0}
    train(runs.config(**settings), tmp_path, toy_config.FIELDS)
    said = [x for x in capsys.readouterr().out.splitlines() if "update skipped" in x]
    assert len(said) == 1 and said[0].startswith("step 15: grad_norm ")


def spoilt(task, kind):
    """The evaluators of the toy, one more that fails before them."""
    plain = toy.ToyTask.evaluators(task)
    valid = plain["valid"]

    def raises():
        raise KeyError("no such file")
        yield

    def nan(params, batch):
        return {"score": (batch["weight"].sum() * np.nan, batch["weight"].sum())}

    extra = Evaluator(raises, valid.metrics) if kind == "raises" else Evaluator(valid.dataset, nan)
    return {"broken": extra} | plain


@pytest.mark.parametrize(
    ("kind", "reason"), [("raises", "KeyError: 'no such file'"), ("nan", "score is nan")]
)
def test_f22_an_evaluator_that_fails_is_named_and_costs_no_step(
    kind, reason, tmp_path, monkeypatch, capfd
):
    plain = toy.make_task

    class Spoilt(toy.ToyTask):
        def evaluators(self):
            return spoilt(self, kind)

    monkeypatch.setattr(toy, "make_task", lambda config: Spoilt(plain(config).config))
    config = runs.config(eval_every=5, keep_best=1, best_metric="broken/score")
    with pytest.raises(RunError, match="evaluator 'broken'") as error:
        train(config, tmp_path, toy_config.FIELDS)
    assert reason in str(error.value)
    assert runs.steps_saved(tmp_path) == [5]  # saved although no checkpoint was due
    assert ("Traceback" in capfd.readouterr().err) == (kind == "raises")

    with pytest.raises(RunError, match="evaluator 'broken'"):  # still owed, and asked for first
        train(config, tmp_path, toy_config.FIELDS)
    assert [r["step"] for r in runs.lines(tmp_path)][-1] == 5

    config = runs.config(
        eval_every=5, keep_best=1, best_metric="broken/score", on_evaluation_error="continue"
    )
    assert train(config, tmp_path, toy_config.FIELDS).step == 20
    said = capfd.readouterr().out
    assert said.count("evaluator 'broken'") == 4  # at 5, 10, 15 and 20
    assert [r["step"] for r in runs.lines(tmp_path, "valid")] == [5, 10, 15, 20]
    assert not (tmp_path / "evaluation_owed").exists()


def test_best_metric_names_an_evaluator_of_the_task(tmp_path):
    for changes, said in (
        ({"keep_best": 1}, "needs best_metric"),
        ({"keep_best": 1, "best_metric": "test/loss"}, r"there are \['valid'\]"),
    ):
        with pytest.raises(UsageError, match=said):
            train(runs.config(**changes), tmp_path / "run", toy_config.FIELDS)
    config = runs.config(keep_best=1, best_metric="valid/score", total_steps=4)
    with pytest.raises(RunError, match=r"valid has \['accuracy'"):
        train(config, tmp_path / "run", toy_config.FIELDS)


def test_f34_the_step_compiles_once_and_a_changed_shape_is_said(tmp_path, capsys, monkeypatch):
    compiled = []
    plain = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, *a: compiled.append(1) or plain(self, *a)
    )
    train(runs.config(), tmp_path / "one", toy_config.FIELDS)
    assert capsys.readouterr().out.count("compiled the step") == 1
    assert len(compiled) == 2  # the step and the evaluation
    train(runs.config(data__half_steps=5), tmp_path / "two", toy_config.FIELDS)
    said = [x for x in capsys.readouterr().out.splitlines() if "compiled the step" in x]
    assert len(said) == 2
    assert "input_ids int32[16, 4] -> int32[16, 8]" in said[1]
