"""F33: not enough device memory, at compile or in the run, is explained and met with settings."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from tests.train import runs
from tests.train.test_memory import planned
from train.aot import memory

TPU = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(16.26G) exceeds available HBM (15.75G)."
)
OLDER_TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 21.47G of 15.75G hbm. Exceeded hbm capacity by 5.72G."
)
CLOSE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
    "memory in memory space hbm. Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 1.50M."
)
TPU_RUN = (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 12.00G. That was "
    "not possible. There are 3.21G free.; (0x0x0_HBM0)"
)
GPU_RUN = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes."


def explained(text: str, doing: str = "running", **overrides) -> str | None:
    config, plan, batch, _ = planned(**overrides)
    return memory.explain(jax.errors.JaxRuntimeError(text), plan, batch, config, doing)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TPU, "16.26 GiB needed of 15.75 GiB, 522.2 MiB too much"),
        (OLDER_TPU, "21.47 GiB needed of 15.75 GiB, 5.72 GiB too much"),
        (CLOSE, "15.75 GiB needed of 15.75 GiB, 1.5 MiB too much"),
    ],
)
def test_f33_out_of_memory_at_compile_names_parts_and_three_settings(text, said):
    found = explained(text, "compiling")
    assert found.startswith("out of memory on a device compiling the step: " + said)
    parts = ("parameters 33.27 KiB", "optimiser state 66.54 KiB", "batch 768 B", "activations")
    assert all(part in found for part in parts)
    _, _, tries = found.partition("Try ")
    assert len(tries.split("; ")) == 3 and "--config.micro_batches=2 " in tries
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TPU_RUN, "12 GiB could not be had, 3.21 GiB were free"),
        (GPU_RUN, "4 GiB could not be had"),
        ("RESOURCE_EXHAUSTED: out of memory", "the allocator names no size"),
    ],
)
def test_f33_out_of_memory_in_the_run_names_parts_and_three_settings(text, said):
    found = explained(text)
    assert found.startswith("out of memory on a device running the step: " + said)
    assert "gradients 33.27 KiB and the activations" in found
    assert len(found.partition("Try ")[2].split("; ")) == 3


def test_f33_a_real_allocation_that_fails_is_explained():
    config, plan, batch, _ = planned()
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(2**50, jnp.int8).block_until_ready()
    found = memory.explain(caught.value, plan, batch, config)
    assert "1,048,576 GiB could not be had" in found


@pytest.mark.parametrize(
    "text",
    [
        "INTERNAL: the device is gone",
        "RESOURCE_EXHAUSTED: quota of requests per minute",
        "INVALID_ARGUMENT: cannot allocate a negative size",
    ],
)
def test_f33_other_errors_keep_their_own_words(text):
    assert explained(text) is None
    config, plan, batch, _ = planned()
    assert memory.explain(ValueError(TPU), plan, batch, config) is None


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, not a TPU: pip install 'jax[tpu]'",
)
def test_f33_a_step_too_large_for_a_tpu_is_refused_with_sizes_before_anyone_rents_it(tmp_path):
    target = tmp_path / "report.json"
    done = runs.python(
        "-m",
        "train.compile",
        "--config=tests/train/toy_config.py:quickstart",
        "--config.model.width=66000",
        "--topology=v5e:2x2",
        f"--json={target}",
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "does not fit by 0.51 GiB: 15.75 GiB available" in done.stdout
    assert "compiling the step: 16.26 GiB needed of 15.75 GiB" in done.stdout
    (program,) = json.loads(target.read_text())["programs"]
    assert program["fits"] is False
    # 66,000 x 66,000 float32 over 4 devices, and the two thin matrices beside it.
    quarter = 4 * (66000 * 66000 + 64 * 66000) // 4
    assert program["held"]["parameters"] == pytest.approx(quarter, rel=1e-3)
    assert program["held"]["optimiser state"] == pytest.approx(2 * quarter, rel=1e-3)
