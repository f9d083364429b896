"""`--config.profile=N`: a trace with named steps and blocks; a full disk costs only the trace."""

import gzip

import jax

from tests.train import runs, toy_config
from train.loop import train


def test_the_trace_holds_the_steps_asked_for_by_name(tmp_path, capsys):
    train(runs.config(profile=3), tmp_path, toy_config.FIELDS)
    assert "profile of 3 steps in" in capsys.readouterr().out
    (trace,) = (tmp_path / "profile").glob("**/*.trace.json.gz")
    text = gzip.open(trace, "rt").read()
    steps = {number for number in range(1, 21) if f'"step_num":"{number}"' in text}
    assert steps == {4, 5, 6}


def test_blocks_are_named_in_the_program(tmp_path):
    from jaxmodels.core import partitioning
    from tests.train import toy
    from train import state as state_lib
    from train.step import make_train_step

    config = runs.config()
    mesh = partitioning.make_mesh(1, 1, jax.devices()[:1])
    task = toy.make_task(config)
    with jax.set_mesh(mesh):
        plan = state_lib.layout(task, config, mesh)
        batch = {k: jax.numpy.asarray(v) for k, v in next(iter(task.datasets("train"))).items()}
        lowered = make_train_step(task, config, mesh, plan).lower(plan.abstract, batch)
    text = lowered.compile().as_text()
    assert "optimizer/" in text and "loss)/" in text


def test_a_run_shorter_than_the_trace_keeps_what_there_is(tmp_path, capsys):
    train(runs.config(profile=50, total_steps=6), tmp_path, toy_config.FIELDS)
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))


def test_f10_a_trace_that_cannot_be_written_costs_one_line(tmp_path, capsys, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", full)
    assert train(runs.config(profile=2), tmp_path, toy_config.FIELDS).step == 20
    said = capsys.readouterr().out
    assert said.count("no profile: [Errno 28] No space left on device; training goes on") == 1
