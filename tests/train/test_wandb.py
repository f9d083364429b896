"""Weights & Biases by a stand-in: one run per workdir, own step axis, nothing secret sent."""

import json
import sys
import types

import pytest

from tests.train import runs
from train.errors import UsageError
from train.writers import open_writers
from train.writers import wandb as wandb_writer
from train.writers.wandb import WeightsAndBiases


class Server:
    """What a W&B server would hold: {run id: its config, points and summary}."""

    def __init__(self):
        self.runs, self.calls, self.error = {}, [], None

    def init(self, **kwargs):
        self.calls.append(kwargs)
        if self.error is not None:
            raise self.error
        known = self.runs.setdefault(kwargs["id"], {"points": [], "metrics": [], "summary": {}})
        known["config"] = kwargs["config"]
        return types.SimpleNamespace(
            url="https://wandb.example/run",
            summary=known["summary"],
            define_metric=lambda *a, **k: known["metrics"].append((a, k)),
            log=lambda values: (known["points"].append(values), known["summary"].update(values)),
            finish=lambda: self.calls.append("finish"),
        )


@pytest.fixture
def server(monkeypatch):
    server = Server()
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.init, module.Settings = server.init, lambda **kwargs: kwargs
    monkeypatch.setitem(sys.modules, "wandb", module)
    return server


def test_a_restarted_run_continues_the_same_one_with_each_step_once(server, tmp_path):
    config = runs.config(wandb="team/project")
    first = WeightsAndBiases(tmp_path, config)
    for step in (10, 20, 30):
        first.write(step, "train", {"loss": float(step)})
    first.close()
    second = WeightsAndBiases(tmp_path, config)  # from the checkpoint of step 10
    for step in (20, 30, 40):
        second.write(step, "train", {"loss": float(step)})
    second.write(40, "valid", {"loss": 0.0})
    second.close()
    calls = [call for call in server.calls if call != "finish"]
    assert calls[0]["id"] == calls[1]["id"] and len(server.runs) == 1
    assert {(c["project"], c["entity"], c["resume"]) for c in calls} == {
        ("project", "team", "allow")
    }
    (run,) = server.runs.values()
    steps = [p["step"] for p in run["points"]]
    assert steps == [10, 20, 30, 30, 40, 40] == sorted(steps)
    assert (("*",), {"step_metric": "step"}) in run["metrics"]
    assert run["points"][-1] == {"valid/loss": 0.0, "step": 40}


def test_another_workdir_is_another_run(server, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        WeightsAndBiases(tmp_path / name, runs.config(wandb="p")).close()
    assert len(server.runs) == 2


def test_no_secret_of_the_config_is_sent(server, tmp_path):
    config = runs.config(wandb="p", warm_start="https://h/w?X-Goog-Signature=0123456789abcdef")
    WeightsAndBiases(tmp_path, config).close()
    (run,) = server.runs.values()
    assert "0123456789abcdef" not in json.dumps(run["config"], default=str)
    assert run["config"]["optimizer.learning_rate"] == 0.01


def test_without_the_package_it_is_a_wrong_use(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb_writer.check(runs.config())
    for act in (wandb_writer.check, lambda c: open_writers(tmp_path, c, 0).__enter__()):
        with pytest.raises(UsageError, match="pip install wandb"):
            act(runs.config(wandb="p"))


def test_a_folder_called_wandb_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if getattr(__import__("wandb"), "init", None) is None:
        with pytest.raises(UsageError, match="not installed"):
            wandb_writer.check(runs.config(wandb="p"))
    sys.modules.pop("wandb", None)


def test_nobody_logged_in_is_a_wrong_use_but_no_network_is_not(server, tmp_path, capsys):
    config = runs.config(wandb="p")
    server.error = type("UsageError", (Exception,), {})("api_key not configured (no-tty)")
    with pytest.raises(UsageError, match="wandb login"), open_writers(tmp_path, config, 0):
        pass
    server.error = type("CommError", (Exception,), {})("no route to host")
    with open_writers(tmp_path, config, 0) as writers:
        writers.write(1, "train", {"loss": 1.0})
    assert "no route to host" in capsys.readouterr().out
    assert [line["step"] for line in runs.lines(tmp_path)] == [1]


def test_a_run_id_that_cannot_be_read_is_named(server, tmp_path):
    (tmp_path / wandb_writer.FILE).write_text("{")
    with pytest.raises(UsageError, match="wandb_run_id.json is damaged"):
        WeightsAndBiases(tmp_path, runs.config(wandb="p"))
