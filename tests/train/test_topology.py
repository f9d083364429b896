"""Hardware by name: what is accepted, what its devices are, the mesh that is laid out on it."""

import importlib.util
import json
import os
import sys

import jax
import pytest

from tests.train import runs
from train.aot import topology
from train.errors import UsageError
from train.flops import peak_flops

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, not a TPU: pip install 'jax[tpu]'",
)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("v5e:4x4", (4, 4)),
        ("v5p:2x2x2", (2, 2, 2)),
        ("H200", (1,)),
        ("h100:8", (8,)),
        ("cpu:8", (8,)),
    ],
)
def test_names_are_read(text, shape):
    assert topology.parse(text).shape == shape


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v6:4x4", "known are v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200, cpu.*nearest: v6e"),
        ("v5e", "accepted is v5e:NxN, as in v5e:4x4"),
        ("v5e:4x4x4", "accepted is v5e:NxN"),
        ("v5p:4x4", "accepted is v5p:NxNxN"),
        ("v5e:-1x4", "accepted is v5e:NxN"),
        ("v5e:32x32", "accepted are 1 to 256 of v5e in a slice"),
        ("h200:16", "accepted are 1 to 8"),
        ("h200:0", "accepted are 1 to 8"),
        ("cpu:x", "accepted is cpu:N"),
    ],
)
def test_other_names_are_refused_with_those_accepted(text, said):
    with pytest.raises(UsageError, match=said):
        topology.parse(text)


def test_less_than_one_slice_is_refused():
    with pytest.raises(UsageError, match="--slices=0"):
        topology.parse("v5e:4x4", 0)


def test_simulated_devices_replace_a_number_given_before(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=3")
    found = topology.environment(topology.parse("cpu:4", 2))
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=8"


@pytest.mark.parametrize("text", ["cpu:2", "v5e:2x2", "h200"])
def test_jax_never_looks_for_the_hardware_itself(text):
    assert topology.environment(topology.parse(text))["JAX_PLATFORMS"] == "cpu"


def test_the_peak_of_all_hardware_in_the_table_is_known():
    assert all(peak_flops(c.kind) for name, c in topology.CHIPS.items() if name != "cpu")


def test_a_gpu_has_the_share_of_its_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    assert topology.parse("h200").memory == 112_500_000_000
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert topology.parse("h200").memory == 135_000_000_000


@pytest.mark.parametrize(
    ("text", "module", "extra"), [("v5e:2x2", "libtpu", "tpu"), ("h200", "jax_plugins", "cuda13")]
)
def test_a_missing_compiler_is_named_with_its_package(monkeypatch, text, module, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith(module) else find(name)
    )
    with pytest.raises(UsageError, match=rf'pip install "jax\[{extra}\]"'):
        topology.mesh_for(topology.parse(text))


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="mesh.device=3 does not divide the 1 devices"):
        topology.mesh_for(topology.parse("cpu:1"), device=3)
    assert dict(topology.mesh_for(topology.parse("cpu:1")).shape) == {"node": 1, "device": 1}
    assert topology.slice_of(topology.parse("cpu:1"), topology.mesh_for(topology.parse("cpu:1")))


def described():
    """What the TPU compiler says of each kind of hardware, as JSON; run in a process of its own."""
    wanted = {
        "v4:2x2x1": 1,
        "v5e:1x1": 1,
        "v5e:4x4": 1,
        "v5e:2x4": 2,
        "v5p:2x2x2": 1,
        "v6e:16x16": 1,
        "tpu7x:2x2x1": 1,
    }
    found = {}
    for text, slices in wanted.items():
        hardware = topology.parse(text, slices)
        mesh = topology.mesh_for(hardware)
        kinds = {device.device_kind for device in mesh.devices.flat}
        found[text] = {
            "mesh": list(mesh.shape.values()),
            "kind": kinds == {hardware.chip.kind},
            "slices": topology.slice_of(hardware, mesh),
        }
    by_host = topology.mesh_for(topology.parse("v5e:4x4"), 4, 4)
    try:
        topology.mesh_for(topology.parse("v5e:3x5"))
    except UsageError as error:
        found["refusal"] = str(error)
    return found | {"by_host": list(by_host.shape.values())}


@pytest.fixture(scope="module")
def tpus():
    environment = topology.environment(topology.parse("v5e:2x2"))
    done = runs.python("-m", "tests.train.test_topology", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_libtpu
def test_the_compiler_knows_every_tpu_in_the_table(tpus):
    assert all(tpus[text]["kind"] for text in tpus if ":" in text)
    meshes = {text: tpus[text]["mesh"] for text in tpus if ":" in text}
    assert meshes == {
        "v4:2x2x1": [1, 4],  # two cores are one device
        "v5e:1x1": [1, 1],
        "v5e:4x4": [1, 16],  # four hosts of one slice are one node
        "v5e:2x4": [2, 8],
        "v5p:2x2x2": [1, 8],
        "v6e:16x16": [1, 256],
        "tpu7x:2x2x1": [1, 8],  # a chip is two devices
    }


@needs_libtpu
def test_slices_are_nodes(tpus):
    assert tpus["v5e:2x4"]["slices"] == [0] * 8 + [1] * 8
    assert set(tpus["v5e:4x4"]["slices"]) == {0}


@needs_libtpu
def test_one_slice_may_be_laid_out_as_several_nodes(tpus):
    assert tpus["by_host"] == [4, 4]


@needs_libtpu
def test_a_shape_that_the_compiler_refuses_is_a_usage_error(tpus):
    assert "--topology=v5e:3x5: the compiler refuses it" in tpus["refusal"]


if __name__ == "__main__":
    assert "libtpu" not in sys.modules and os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    print("\n" + json.dumps(described()))
    assert jax.default_backend() == "cpu"
