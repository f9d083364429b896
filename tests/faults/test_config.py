"""F28: a wrong setting is one line and status 2 within seconds, before any device is touched."""

import resource

import pytest

from tests.train import runs

VCC = "--config=configs/vcc.py:quickstart"
# Any use of a device fails under this, with a traceback and status 1.
NO_DEVICES = {"JAX_PLATFORMS": "no_such_platform"}


def refusal(workdir, *argv):
    """The one line of a command that must be refused; checks status, time and what it touched."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = runs.python("-m", "train.main", f"--workdir={workdir}", *argv, **NO_DEVICES)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    # Of the processor: the wall clock depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert not workdir.exists()
    return done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(
            ["--config=configs/vcc.py:quikstart"],
            ["preset 'quikstart'", "nearest: quickstart"],
            id="misspelt_preset",
        ),
        pytest.param(
            ["--config=configs/vc.py:quickstart"],
            ["configs/vc.py: no such file", "nearest: configs/vcc.py"],
            id="misspelt_file",
        ),
        pytest.param(
            [VCC, "--config.model.atention=xla"],
            ["config.model.atention", "nearest: config.model.attention"],
            id="unknown_key",
        ),
        pytest.param(
            [VCC, "--config.optimizer.lr=0.1"],
            ["config.optimizer.lr", "nearest: config.optimizer.learning_rate"],
            id="abbreviated_key",
        ),
        pytest.param(
            [VCC, "--config.data.num_workers=two"],
            ["data.num_workers=two", "accepted is int, >= 0"],
            id="wrong_type",
        ),
        pytest.param(
            [VCC, "--config.total_steps=1e3"],
            ["total_steps=1e3", "accepted is int, > 0"],
            id="float_for_an_int",
        ),
        pytest.param(
            [VCC, "--config.batch_size=0"],
            ["batch_size=0", "accepted is int, > 0"],
            id="zero",
        ),
        pytest.param(
            [VCC, "--config.optimizer.learning_rate=-1"],
            ["optimizer.learning_rate=-1", "accepted is float, > 0"],
            id="negative",
        ),
        pytest.param(
            [VCC, "--config.optimizer.learning_rate=nan"],
            ["optimizer.learning_rate=nan", "accepted is float, > 0"],
            id="not_a_number",
        ),
        pytest.param(
            [VCC, "--config.optimizer.b1=1"],
            ["optimizer.b1=1", "accepted is float, 0 to 0.9999"],
            id="out_of_range",
        ),
        pytest.param(
            [VCC, "--config.optimizer.name=adamm"],
            ["optimizer.name=adamm", "adamw | adam | sgd | adafactor", "nearest: adam"],
            id="unknown_optimiser",
        ),
        pytest.param(
            [VCC, "--config.model.dtype=bfloat17"],
            ["model.dtype=bfloat17", "float32 | bfloat16", "nearest: bfloat16"],
            id="unknown_dtype",
        ),
        pytest.param(
            [VCC, "--config.model.attention=cuddn"],
            ["model.attention=cuddn", "auto | xla | chunked | cudnn", "nearest: cudnn"],
            id="unknown_kernel",
        ),
        pytest.param(
            [VCC, "--config.micro_batches=3"],
            ["batch_size=4", "micro_batches=3", "nearest: 3 or 6"],
            id="indivisible_micro_batches",
        ),
        pytest.param(
            [VCC, "--config.mesh.node=3", "--config.mesh.device=1"],
            ["batch_size=4", "3 devices", "nearest: 3 or 6"],
            id="indivisible_mesh",
        ),
        pytest.param(
            [VCC, "--config.optimizer.warmup_steps=1000"],
            ["optimizer.warmup_steps=1000", "at most total_steps=280"],
            id="warm_up_longer_than_the_run",
        ),
        pytest.param(
            [VCC, "--config.on_nonfinite=ignore"],
            ["on_nonfinite=ignore", "stop | skip"],
            id="unknown_choice",
        ),
    ],
)
def test_f28_a_wrong_setting_is_named_with_what_is_accepted(tmp_path, argv, said):
    line = refusal(tmp_path / "run", *argv)
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(
            ["--config.model.num_heads=7"],
            ["model.num_heads=7 does not divide model.d_model=64"],
            id="heads_not_dividing_the_width",
        ),
        pytest.param(
            ["--config.model.layer_kinds=vcc"],
            ["model.layer_kinds names 1 layers", "model.num_layers is 3"],
            id="layers_that_disagree",
        ),
        pytest.param(
            ["--config.data.length=100"],
            ["data.length", "length=100"],
            id="data_that_do_not_fit",
        ),
        pytest.param(
            ["--config.method=vc"],
            ["unknown method 'vc'", "nearest: vcc"],
            id="misspelt_method",
        ),
        pytest.param(
            ["--config.wandb=project"],
            ["config.wandb", "pip install wandb"],
            id="absent_package",
        ),
    ],
)
def test_f28_settings_that_only_the_method_can_judge_touch_no_device_either(
    tmp_path, monkeypatch, argv, said
):
    (tmp_path / "wandb.py").write_text("")  # stands before a package that may be installed
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = refusal(tmp_path / "run", VCC, *argv)
    assert all(part in line for part in said), line
