"""`python -m train.compile`: the step of training, compiled for what is not there, in figures."""

import dataclasses
import functools
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import attention
from jaxmodels.data import pipeline
from tests.train import runs, toy, toy_config
from train import compile as compile_lib
from train.aot import report as compile_report
from train.aot import topology
from train.flops import count_flops

TOY = "--config=tests/train/toy_config.py:quickstart"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, not a TPU: pip install 'jax[tpu]'",
)
# quickstart of VCC, cut down to what compiles and trains in seconds.
SMALL_VCC = (
    "--config=configs/vcc.py:quickstart",
    "--config.total_steps=1",
    "--config.optimizer.warmup_steps=0",
    "--config.batch_size=8",
    "--config.data.length=256",
    "--config.data.fact_groups=2",
    "--config.data.train_documents=16",
    "--config.data.validation_documents=8",
    *(f"--config.data.curriculum_{name}=" for name in ("lengths", "groups", "batches", "steps")),
)


def compiled(tmp_path, *flags: str, status: int = 0) -> tuple[dict, str]:
    """(the JSON, what was printed) of one command line."""
    target = tmp_path / "report.json"
    done = runs.python("-m", "train.compile", *flags, f"--json={target}")
    assert done.returncode == status, done.stderr[-3000:]
    return json.loads(target.read_text()), done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((TOY,), "--topology is missing"),
        ((TOY, "--topology=v5"), "known are v4, v5e, v5p"),
        ((TOY, "--topology=v5e:4x4", "--slices=x"), "--slices=x: accepted is a whole number"),
        ((TOY, "--topology=cpu:8", "--config.batch_size=12"), "batch_size=12 does not split"),
        ((TOY, "--topology=cpu:8", "--config.mesh.node=3"), "mesh.node=3 does not divide the 8"),
        ((TOY, "--topology=cpu:8", "--config.model.width=13"), "model.width=13"),
        ((TOY, "--topology=cpu:8", "--json=/no/such/folder/x.json"), "folder does not exist"),
    ],
)
def test_bad_requests_leave_with_2_and_one_line(flags, said):
    done = runs.python("-m", "train.compile", *flags)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return compiled(folder, TOY, "--topology=cpu:4", "--slices=2", XLA)


XLA = "--config.model.width=128"


def test_memory_is_that_of_one_device(on_cpu):
    (program,) = on_cpu[0]["programs"]
    # Split over the four devices of a node; small ones and what has no axis names are repeated.
    parameters = 4 * ((64 * 128 + 128 * 128) // 4 + 128 + 128 * 4 + 4)
    assert program["usage"]["parameters"] == parameters
    assert 2 * parameters <= program["usage"]["optimizer"] <= 2 * parameters + 16
    assert program["usage"]["batch"] == 16 // 8 * (8 * 4 + 8 + 4 + 4)
    assert program["needed"] > 3 * parameters and program["available"] is None


def test_collectives_are_named_by_axis(on_cpu):
    found = {(row["kind"], row["axes"]): row for row in on_cpu[0]["programs"][0]["traffic"]}
    gathered = found["all-gather", "device"]
    assert gathered["bytes"] >= 4 * (64 * 128 + 128 * 128)  # each split matrix at least once
    assert gathered["sent"] == gathered["bytes"] * 3 // 4
    assert any(axes.startswith("node") for _, axes in found)
    assert {row["network"] for row in found.values()} == {"host"}


def test_the_text_names_everything(on_cpu):
    report, text = on_cpu
    assert text.startswith("2 slices of cpu:4: 8 x cpu, mesh node 2 x device 4, jax ")
    for words in ("parameters ", "optimiser state ", "temporaries ", "total ", "no limit known"):
        assert words in text
    assert "FLOPs: " in text and "bytes moved: " in text and "all-reduce" in text
    assert report["fits"] and report["programs"][0]["digest"] in text


def test_flops_are_those_of_training(on_cpu):
    # Gradient of an embedding look-up, two matrix products forward, twice that backward.
    products = 2 * 16 * (128 * 128 + 128 * 4)
    assert on_cpu[0]["programs"][0]["flops"] == 3 * products


def programs(command: str, output, *flags: str) -> list:
    done = runs.python(
        "-m",
        "tests.train.program_script",
        command,
        str(output),
        *flags,
        devices=8,
        JAX_COMPILATION_CACHE_DIR=str(output.parent / "cache"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            (TOY, "--config.total_steps=2", "--config.optimizer.warmup_steps=0"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            (
                TOY,
                "--config.total_steps=2",
                "--config.optimizer.warmup_steps=0",
                "--config.micro_batches=2",
                "--config.mesh.node=2",
                "--config.mesh.device=4",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(SMALL_VCC, marks=pytest.mark.long),
    ],
    ids=["toy", "toy on 2x4", "vcc"],
)
def test_the_program_is_the_one_that_training_runs(tmp_path, flags):
    trained = programs("train", tmp_path / "train.json", *flags, f"--workdir={tmp_path / 'run'}")
    ahead = programs("compile", tmp_path / "compile.json", *flags, "--topology=cpu:8")
    assert len(trained) == 1 and ahead == trained  # the text before and after XLA


def test_a_process_that_has_jax_with_other_devices_starts_a_new_one(tmp_path, capfd):
    target = tmp_path / "report.json"
    with pytest.raises(SystemExit) as left:
        compile_lib.main([TOY, "--topology=cpu:16", f"--json={target}"])
    assert left.value.code == 0
    assert "16 x cpu" in capfd.readouterr().out and target.exists()
    assert len(jax.devices()) == 1 and "xla_force_host" not in os.environ.get("XLA_FLAGS", "")


def test_dry_run_names_parameters_bytes_batches_and_flops():
    text = compile_lib.dry_run(runs.config(), toy_config.FIELDS)
    for words in (
        "tests.train.toy for 20 steps: 1 x ",
        "hidden/kernel    64x64",
        "parameters: 33.27 KiB a device",
        "optimiser state: 66.54 KiB a device",
        "gradients: 33.27 KiB a device",
        "input_ids [16, 8]",
    ):
        assert words in text
    flops = 3 * 2 * 16 * (64 * 64 + 64 * 4)
    assert f"{flops / 1e9:,.4g}" in text and f"all steps: {20 * flops:.4g} FLOP" in text


def test_a_program_that_compiles_and_yet_does_not_fit_is_told_what_to_try(monkeypatch):
    small = dataclasses.replace(topology.CHIPS["cpu"], memory=150_000)
    monkeypatch.setitem(topology.CHIPS, "cpu", small)
    report = compile_report.compile_for(runs.config(), topology.parse("cpu:1"))
    over = report.programs[0].needed - 150_000
    assert over > 0 and not report.fits and report.as_json()["fits"] is False
    assert f"does not fit by {over / 2**30:.2f} GiB" in str(report)
    assert "Try more than 1 devices" in str(report) and "--config.micro_batches=" in str(report)


@pytest.fixture
def curriculum(monkeypatch):
    """The toy with five batches of 16 short sequences before batches of 8 whole ones."""
    rows = toy.examples(32, 8, 0)
    short = [{k: v[:4] if np.ndim(v) else v for k, v in row.items()} for row in rows]

    def datasets(self, split):
        stages = [pipeline.Stage(short, None, 16, 5), pipeline.Stage(rows, None, 8)]
        return pipeline.train_batches(stages, seed=0)

    monkeypatch.setattr(toy.ToyTask, "datasets", datasets)


@pytest.mark.usefixtures("curriculum")
def test_dry_run_lists_each_stage_of_a_curriculum():
    text = compile_lib.dry_run(runs.config(), toy_config.FIELDS)
    first, second = (line for line in text.splitlines() if "input_ids [" in line)
    assert first.split()[0] == "5" and "input_ids [16, 4]" in first
    assert second.split()[0] == "15" and "input_ids [8, 8]" in second


@pytest.mark.usefixtures("curriculum")
def test_the_largest_shape_of_a_curriculum_is_compiled_or_all_where_asked():
    here = topology.parse("cpu:1")
    largest = compile_report.compile_for(runs.config(), here)
    assert [(p.batch, p.steps) for p in largest.programs] == [("input_ids [16, 4]", 5)]
    assert "not compiled (--all_shapes does): input_ids [8, 8]" in str(largest)
    whole = compile_report.compile_for(runs.config(), here, all_shapes=True)
    assert [(p.batch, p.steps) for p in whole.programs] == [
        ("input_ids [16, 4]", 5),
        ("input_ids [8, 8]", None),
    ]
    assert "not compiled" not in str(whole) and "(for 5 steps)" in str(whole)


def described_as(platform: str) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind="?", num_cores=None, platform=platform)
    return jax.sharding.AbstractMesh((1, 4), ("node", "device"), abstract_device=device)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_the_platform_is_that_of_the_mesh_in_scope(platform):
    seen = []

    def traced(x):
        seen.append((attention.platform(), attention.chunking()))
        return x

    with jax.sharding.use_abstract_mesh(described_as(platform)):
        jax.eval_shape(jax.grad(jax.jit(traced)), jax.ShapeDtypeStruct((), jnp.float32))
    wanted = attention.CHUNKING.get(platform, attention.CHUNKING_ELSEWHERE)
    assert seen == [(platform, wanted)]


def test_the_platform_without_a_mesh_is_jaxs_own():
    assert attention.platform() == jax.default_backend()


@needs_libtpu
def test_a_tpu_pod_of_two_slices_is_compiled_for_with_collectives_by_network(tmp_path):
    flags = ("--topology=v5e:2x2", "--slices=2", "--config.model.width=1024")
    report, text = compiled(tmp_path, TOY, *flags)
    (program,) = report["programs"]
    parameters = 4 * ((64 * 1024 + 1024 * 1024) // 4 + 1024 + 1024 * 4 + 4)
    assert program["usage"]["parameters"] == parameters
    assert 2 * parameters <= program["usage"]["optimizer"] <= 2 * parameters + 16
    assert program["available"] == int(15.75 * 2**30) and report["fits"]
    networks = {row["network"]: row["axes"] for row in program["traffic"]}
    assert networks == {"ICI": "device", "DCN": "node"}
    # Each device sends its quarter of the gradient of the large matrix to the other slice.
    reduced = [r for r in program["traffic"] if (r["kind"], r["network"]) == ("all-reduce", "DCN")]
    assert reduced[0]["bytes"] >= 4 * 1024 * 1024 // 4
    assert "8 x TPU v5 lite, mesh node 2 x device 4" in text
    assert " GiB free of 15.75 GiB" in text and "at least " in text


def fused_attention():
    """FLOPs of cuDNN's attention beside plain attention, forward and with gradients; as JSON."""
    heads = jnp.ones((2, 512, 4, 64), jnp.bfloat16)
    bias = jnp.zeros((2, 1, 1, 512))  # a bias a key, as masks are

    def total(q, k, v, implementation):
        mixed = attention.dot_product_attention(q, k, v, bias, implementation=implementation)
        return mixed.astype(jnp.float32).sum()

    found = {}
    for name in ("xla", "cudnn"):
        run = functools.partial(total, implementation=name)
        functions = run, jax.grad(run, argnums=(0, 1, 2))
        found[name] = [count_flops(jax.make_jaxpr(f)(heads, heads, heads)) for f in functions]
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the GPU compiler, not a GPU: pip install 'jax[cuda13]'",
)
def test_fused_attention_of_gpus_counts_as_its_products():
    environment = topology.environment(topology.parse("h200"))
    done = runs.python("-m", "tests.train.test_compile", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    forward, both = found["xla"]
    assert found["cudnn"] == [forward, both + forward // 2]  # the scores once more


if __name__ == "__main__":
    print("\n" + json.dumps(fused_attention()))
