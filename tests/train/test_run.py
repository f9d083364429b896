"""Whole runs on one device: exact resume, what is written, evaluation and prediction."""

import json
import logging
import shutil
import warnings

import jax
import numpy as np
import pytest

from jaxmodels.core import params as params_lib
from tests.train import runs, toy, toy_config
from train import cli, evaluate, predict
from train.checkpoint import Checkpoints, load_params, manifest
from train.errors import UsageError
from train.loop import train
from train.trained import open_run

SETTINGS = {"checkpoint_every": 10, "eval_every": 8, "micro_batches": 2, "data__half_steps": 12}


def weights(workdir, step):
    return params_lib.flatten(jax.device_get(open_run(workdir, step).params))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 steps with checkpoints at 10 and 20, what it returned, and what it logged."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained = train(runs.config(**SETTINGS), workdir, toy_config.FIELDS)
    finally:
        logging.getLogger().removeHandler(handler)
    return workdir, trained, records


def cut(finished, folder):
    """A copy of the run as a kill after step 10's checkpoint would have left it."""
    workdir = folder / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    return workdir


def test_a_good_run_warns_of_nothing(finished):
    assert [record.getMessage() for record in finished[2]] == []


def test_it_learns(finished):
    workdir, trained, _ = finished
    losses = [loss for loss, *_ in runs.curve(workdir).values()]
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    assert trained.step == 20 and trained.results["valid"]["loss"] < np.log(toy.CLASSES)


def test_metrics_jsonl_has_each_step_once_with_all_its_numbers(finished):
    workdir, trained, _ = finished
    train_lines, valid = runs.lines(workdir), runs.lines(workdir, "valid")
    assert [r["step"] for r in train_lines] == list(range(1, 21))
    assert [r["step"] for r in valid] == [8, 16, 20]
    names = "loss accuracy grad_norm learning_rate examples_per_second tokens_per_second step_ms"
    for record in train_lines:
        assert set(names.split()) | {"data_wait", "seconds", "compile_seconds"} <= record.keys()
        assert "mfu" not in record  # nobody knows the peak of this machine
    seconds = [r["seconds"] for r in train_lines]
    assert seconds == sorted(seconds) and seconds[-1] <= trained.seconds
    compiling = [r["compile_seconds"] for r in train_lines]
    assert compiling[0] > 0 and len(set(compiling)) == 2  # half-length, then whole
    assert valid[-1]["accuracy"] == trained.results["valid"]["accuracy"]


def test_evaluation_is_exact_with_padding(finished):
    workdir, trained, _ = finished
    run = open_run(workdir)
    rows = toy.examples(27, 8, 99)
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    sums = run.task.metrics(run.params, batch)
    for name, (total, weight) in sums.items():
        assert trained.results["valid"][name] == pytest.approx(float(total / weight), rel=1e-6)


def test_a_killed_run_continues_bit_for_bit(finished, tmp_path, capsys):
    whole, _, _ = finished
    workdir = cut(finished, tmp_path)
    train(runs.config(**SETTINGS), workdir, toy_config.FIELDS)
    assert "continuing from step 10" in capsys.readouterr().out
    assert runs.curve(workdir) == runs.curve(whole)
    assert [r["loss"] for r in runs.lines(workdir, "valid")] == [
        r["loss"] for r in runs.lines(whole, "valid")
    ]
    for path, leaf in weights(whole, 20).items():
        np.testing.assert_array_equal(weights(workdir, 20)[path], leaf, err_msg=path)
    assert runs.lines(workdir)[-1]["seconds"] > runs.lines(whole)[9]["seconds"]


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(runs.config(**SETTINGS), workdir, toy_config.FIELDS).step == 20
    assert "finished already at step 20" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="total_steps 20 -> 5"):
        train(runs.config(**SETTINGS, total_steps=5), workdir, toy_config.FIELDS)
    trained = train(runs.config(**SETTINGS, total_steps=22), workdir, toy_config.FIELDS)
    assert "changed since the last start: total_steps 20 -> 22" in capsys.readouterr().out
    assert trained.step == 22 and list(runs.curve(workdir)) == list(range(1, 23))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate 0.01 -> 0.5"),
        ({"model__width": 32, "seed": 2}, "model.width 64 -> 32; seed 0 -> 2"),
    ],
)
def test_another_config_in_the_folder_is_refused_with_the_differences(finished, change, said):
    before = (finished[0] / "config.json").read_bytes()
    with pytest.raises(UsageError, match="another config") as error:
        train(runs.config(**SETTINGS | change), finished[0], toy_config.FIELDS)
    assert said in str(error.value)
    assert (finished[0] / "config.json").read_bytes() == before


def test_weights_alone_start_another_run(finished, tmp_path, monkeypatch):
    settings = SETTINGS | {"total_steps": 1, "optimizer__warmup_steps": 0}
    config = runs.config(**settings, warm_start=str(finished[0]), optimizer__learning_rate=1e-12)
    train(config, tmp_path / "run", toy_config.FIELDS)
    for path, leaf in weights(finished[0], 20).items():
        np.testing.assert_allclose(weights(tmp_path / "run", 1)[path], leaf, atol=1e-9)


def test_weights_of_another_shape_are_all_listed(finished, tmp_path):
    for place in (finished[0], finished[0] / "checkpoints" / "10"):
        config = runs.config(warm_start=str(place), model__width=32)
        with pytest.raises(UsageError, match="warm_start=") as error:
            train(config, tmp_path / "run", toy_config.FIELDS)
        text = str(error.value)
        assert "hidden/kernel is float32[64,64], wanted float32[32,32]" in text
        assert text.count("wanted") == 4 and "out/bias" not in text


def test_missing_and_unexpected_leaves_are_listed(finished):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        open_run(finished[0]).params,
    )
    abstract["more"] = {"bias": abstract["out"].pop("bias")}
    with pytest.raises(UsageError, match=r"missing more/bias float32\[4\]; unexpected out/bias"):
        load_params(finished[0], abstract)


def test_a_checkpoint_of_another_optimiser_is_refused(finished, tmp_path):
    workdir = cut(finished, tmp_path)
    (workdir / "config.json").unlink()
    with pytest.raises(UsageError, match="checkpoint 10 .*training is of.*opt_state/.*mu"):
        config = runs.config(**SETTINGS, optimizer__name="sgd")
        train(config, workdir, toy_config.FIELDS)


def test_another_pipeline_is_refused_naming_both(finished, tmp_path, monkeypatch):
    workdir = cut(finished, tmp_path)
    plain = toy.ToyTask.datasets

    def marked(version):
        def datasets(self, split):
            found = plain(self, split)
            found.fingerprint = {"data": "toy", "version": version}
            return found

        return datasets

    monkeypatch.setattr(toy.ToyTask, "datasets", marked(1))
    with pytest.raises(UsageError, match="data: saved nothing, now"):
        train(runs.config(**SETTINGS), workdir, toy_config.FIELDS)
    shutil.rmtree(workdir)
    train(runs.config(total_steps=4), workdir, toy_config.FIELDS)
    monkeypatch.setattr(toy.ToyTask, "datasets", marked(2))
    with pytest.raises(UsageError, match="version: saved 1, now 2"):
        train(runs.config(total_steps=5), workdir, toy_config.FIELDS)


def test_data_reset_goes_on_with_other_data_from_their_beginning(finished, tmp_path, capsys):
    workdir = cut(finished, tmp_path)
    config = runs.config(**SETTINGS, data__examples=128)
    with pytest.raises(UsageError, match="data.examples 256 -> 128"):
        train(config, workdir, toy_config.FIELDS)
    trained = train(config, workdir, toy_config.FIELDS, data_reset=True)
    said = capsys.readouterr().out
    assert trained.step == 20 and "data.examples 256 -> 128" in said
    assert "--data_reset: the saved place in the data is given up" in said
    whole = runs.curve(finished[0])
    assert runs.curve(workdir)[11] != whole[11]
    longer = runs.config(**SETTINGS, data__examples=128, total_steps=22)
    train(longer, workdir, toy_config.FIELDS, data_reset=True)  # the same command, given again
    assert "--data_reset" not in capsys.readouterr().out
    with pytest.raises(UsageError, match="model.width 64 -> 32"):
        changed = runs.config(**SETTINGS, model__width=32)
        train(changed, workdir, toy_config.FIELDS, data_reset=True)


def test_the_last_line_says_where_the_time_went(finished, tmp_path, capsys):
    workdir = cut(finished, tmp_path)
    train(runs.config(**SETTINGS), workdir, toy_config.FIELDS)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("done at step 20 after ")
    shares = dict(part.rsplit(" ", 1) for part in last.split("(")[1].rstrip(")").split(", "))
    assert set(shares) == {"steps", "input", "start", "compile", "evaluate", "save"}
    assert 97 <= sum(int(share.rstrip("%")) for share in shares.values()) <= 103


def test_data_that_end_too_soon_are_reported(tmp_path):
    config = runs.config(data__repeat=1, data__examples=48)
    with pytest.raises(RuntimeError, match="ended after 3 of 20 steps"):
        train(config, tmp_path / "run", toy_config.FIELDS)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    config = runs.config(total_steps=5, checkpoint_every=1, keep_checkpoints=2, log_every=3)
    train(config, tmp_path / "run", toy_config.FIELDS)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "5"]
    assert list(runs.curve(tmp_path / "run")) == [1, 3, 5]


def test_the_best_checkpoints_stay_besides_the_newest(tmp_path):
    settings = {"eval_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "keep_best": 2}
    config = runs.config(
        **settings, best_metric="valid/accuracy", optimizer__learning_rate=0.5, total_steps=12
    )
    train(config, tmp_path, toy_config.FIELDS)
    found = {r["step"]: r["accuracy"] for r in runs.lines(tmp_path, "valid")}
    best = sorted(found, key=lambda step: (found[step], step))[-2:]
    assert runs.steps_saved(tmp_path) == sorted({*best, 12})
    assert set(best) != {11, 12}  # else the newest would be the best, and this would show nothing


def test_a_failed_background_write_is_noticed_by_the_next_line_and_made_good(
    finished, tmp_path, monkeypatch, capsys
):
    plain, look, failed = manifest.write, Checkpoints.poll, []

    def look_when_settled(saved):  # twenty steps of the toy may be over before a write has failed
        saved._writer.state(seconds=60)
        return look(saved)

    def fails_once(folder, facts):
        if not failed:
            failed.append(folder)
            raise OSError(5, "Input/output error")
        return plain(folder, facts)

    monkeypatch.setattr(manifest, "write", fails_once)
    monkeypatch.setattr(Checkpoints, "poll", look_when_settled)
    train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    said = capsys.readouterr().out
    warnings_said = [line for line in said.splitlines() if line.startswith("warning: ")]
    failure = "checkpoint 10 was not written: OSError: [Errno 5] Input/output error"
    assert warnings_said == [f"warning: {failure}; saving step 11"]
    assert runs.is_whole(tmp_path, 11)
    assert runs.curve(tmp_path) == runs.curve(finished[0])


def test_a_failed_write_that_ends_after_the_last_line_is_told_before_the_next_save(
    finished, tmp_path, monkeypatch, capsys
):
    plain, failed = manifest.write, []

    def fails_once(folder, facts):
        if not failed:
            failed.append(folder)
            raise OSError(5, "Input/output error")
        return plain(folder, facts)

    monkeypatch.setattr(manifest, "write", fails_once)
    monkeypatch.setattr(Checkpoints, "poll", lambda saved: None)  # every line came too early
    train(runs.config(**SETTINGS), tmp_path, toy_config.FIELDS)
    said = capsys.readouterr().out
    warnings_said = [line for line in said.splitlines() if line.startswith("warning: ")]
    failure = "checkpoint 10 was not written: OSError: [Errno 5] Input/output error"
    assert warnings_said == [f"warning: {failure}; saving step 20"]
    assert runs.steps_saved(tmp_path) == [20] and runs.is_whole(tmp_path, 20)


def test_tensorboard_events_are_written(finished):
    assert list((finished[0] / "tensorboard").glob("events.out.tfevents.*"))


def test_evaluate_prints_and_keeps_the_results_of_training(finished, capsys):
    workdir, trained, _ = finished
    evaluate.main([f"--workdir={workdir}"])
    record = json.loads((workdir / "evaluation.json").read_text())
    assert record["step"] == 20 and "accuracy" in capsys.readouterr().out
    assert record["results"]["valid"]["loss"] == trained.results["valid"]["loss"]
    evaluate.main([f"--workdir={workdir}", "--step=10", "--config.batch_size=8"])
    record = json.loads((workdir / "evaluation.json").read_text())
    assert record["step"] == 10 and record["overrides"] == {"batch_size": "8"}
    with pytest.raises(UsageError, match=r"no checkpoint of step 3; there are \[10, 20\]"):
        evaluate.main([f"--workdir={workdir}", "--step=3"])
    with pytest.raises(UsageError, match="nearest: config.model.width"):
        evaluate.main([f"--workdir={workdir}", "--config.model.widht=3"])


def test_predict_writes_a_line_for_a_line(finished, tmp_path, capsys):
    rows = [{"input_ids": [5, 3]}, {"input_ids": [6, 1, 2]}]
    (tmp_path / "in").write_text("\n\n".join(map(json.dumps, rows)))
    argv = [f"--workdir={finished[0]}", f"--input={tmp_path}/in", f"--output={tmp_path}/out"]
    predict.main(argv)
    outputs = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    run = open_run(finished[0])
    assert outputs == run.task.predict(run.params, rows)
    (tmp_path / "in").write_text('{"text": 1}\n')
    with pytest.raises(UsageError, match="row 1 has no input_ids"):
        predict.main(argv)


def test_a_run_without_a_checkpoint_cannot_be_evaluated(finished, tmp_path):
    shutil.copy(finished[0] / "config.json", tmp_path)
    with pytest.raises(UsageError, match="no checkpoint there"):
        evaluate.main([f"--workdir={tmp_path}"])


def test_the_saved_config_is_the_whole_truth(finished):
    run = open_run(finished[0])
    assert run.config == runs.config(**SETTINGS)
    assert cli.describe(run.config, toy_config.FIELDS)
