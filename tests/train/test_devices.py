"""What happens before any array: the compilation cache, the words for a mesh, the clock."""

import time

import jax
import pytest

from jaxmodels.core import partitioning
from tests.train import runs
from train import devices
from train.clock import Clock
from train.errors import UsageError


def test_programs_are_kept_where_asked_else_where_jax_was_told_else_at_home(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    devices.use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "told")
    devices.use_compilation_cache(str(tmp_path / "asked"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "asked")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    devices.use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "home" / "jaxmodels" / "compiled")


def test_programs_of_a_cpu_are_worth_keeping():
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    devices.use_compilation_cache(None)
    assert jax.config.jax_persistent_cache_min_compile_time_secs <= 0.2
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


def test_the_first_line_names_devices_mesh_and_version():
    text = devices.describe(partitioning.make_mesh(devices=jax.devices()[:1]))
    assert (
        text == f"1 x {jax.devices()[0].device_kind}, mesh node 1 x device 1, jax {jax.__version__}"
    )


def test_a_mesh_that_does_not_fit_is_a_usage_error():
    with pytest.raises(UsageError, match="mesh.device=5"):
        devices.start(runs.config(mesh__device=5))


def test_the_clock_keeps_pauses_apart_and_goes_on_from_before():
    clock = Clock(10.0, {"compile": 5.0})
    with clock.pause("compile"):
        time.sleep(0.05)
    with pytest.raises(KeyError), clock.pause("evaluate"):
        raise KeyError
    assert 10.0 <= clock.seconds < 10.04
    assert 5.05 <= clock.pauses["compile"] < 6 and clock.pauses["evaluate"] >= 0
