"""Hardware by name: what one device of it holds, and the mesh that training would lay out on it.

A name is read and checked, and its environment known, before jax is imported: see `parse` and
`environment`. `mesh_for` then asks the compilers for descriptions of devices that are not there.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from train.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a kind of hardware, as jax lists it.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      kind: jax's `device_kind`, the key of `flops.PEAKS`.
      memory: bytes that a program can have; None where it is not known.
      bandwidth: of that memory, bytes/s.
      networks: names of the links (inside a slice or box, between them).
      dimensions: numbers in the name after the colon.
      most: chips in the largest slice (devices in a box) that exists.
      description: extra arguments of the topology description; for GPUs the values of `_TARGET`.
    """

    platform: str
    kind: str
    memory: int | None
    bandwidth: float | None
    networks: tuple[str, str]
    dimensions: int
    most: int
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_TPU = ("ICI", "DCN")
_GPU = ("NVLink", "network")


def _tpu(kind: str, gib: float, bandwidth: float, dimensions: int, most: int, **more: Any) -> Chip:
    return Chip("tpu", kind, int(gib * GIB), bandwidth, _TPU, dimensions, most, more)


def _gpu(kind: str, memory: int, bandwidth: int, **description: Any) -> Chip:
    return Chip("gpu", kind, memory, float(bandwidth), _GPU, 1, 8, description)


# Memory of TPUs: the limit that their compiler states when a program does not fit, which is a
# little less than the data sheet's. A v4 or v5p device is a chip (two cores as one), a tpu7x chip
# is two devices. Memory of GPUs: as the driver reports it. Bandwidths: the makers' data sheets.
CHIPS: dict[str, Chip] = {
    "v4": _tpu("TPU v4", 30.75, 1.2e12, 3, 4096, chip_config_name="megacore"),
    "v5e": _tpu("TPU v5 lite", 15.75, 0.82e12, 2, 256),
    "v5p": _tpu("TPU v5", 95.74, 2.77e12, 3, 8960),
    "v6e": _tpu("TPU v6 lite", 31.25, 1.64e12, 2, 256),
    "tpu7x": _tpu("TPU7x", 94.75, 3.69e12, 3, 9216),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB",
        85_100_068_864,
        2_039_040_000_000,
        cores=108,
        units=64,
        shared=167936,
        optin=166912,
        cache=41943040,
        clock=1.41,
        capability=8,
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3",
        84_942_979_072,
        3_352_320_000_000,
        cores=132,
        units=128,
        shared=233472,
        optin=232448,
        cache=52428800,
        clock=1.98,
        capability=9,
    ),
    "h200": _gpu(
        "NVIDIA H200",
        150_000_000_000,
        4_800_000_000_000,
        cores=132,
        units=128,
        shared=233472,
        optin=232448,
        cache=62914560,
        clock=1.98,
        capability=9,
    ),
    "b200": _gpu(
        "NVIDIA B200",
        191_514_411_008,
        7_672_320_000_000,
        cores=148,
        units=128,
        shared=233472,
        optin=232448,
        cache=132644864,
        clock=1.965,
        capability=10,
    ),
    "cpu": Chip("cpu", "cpu", None, None, ("host", "host"), 1, 512),
}

# What XLA's GPU compiler wants to know of a device that is not there.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}  threads_per_core_limit: 2048  core_count: {cores}
  fpus_per_core: {units}  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}
  clock_rate_ghz: {clock}  device_memory_size: {memory}  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {capability} minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 10 }}  device_description_str: "{kind}"
"""

_EXAMPLES = "v5e:4x4, v5p:2x2x2, h200:8, cpu:8"
# jax takes this share of a GPU's memory unless the environment says otherwise.
_GPU_SHARE = ("XLA_CLIENT_MEM_FRACTION", 0.75)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: of the hardware, a key of `CHIPS`.
      shape: numbers after the colon: chips along each dimension, GPUs in a box, CPU devices.
      slices: TPU slices joined by the data centre's network; boxes of GPUs.
    """

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What one device is."""
        return CHIPS[self.name]

    @property
    def memory(self) -> int | None:
        """Bytes of one device that a program can have; for GPUs the share that jax takes."""
        if self.chip.memory is None or self.chip.platform != "gpu":
            return self.chip.memory
        name, share = _GPU_SHARE
        return int(self.chip.memory * float(os.environ.get(name, share)))

    def __str__(self) -> str:
        name = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices} slices of {name}" if self.slices > 1 else name


def parse(text: str, slices: int = 1) -> Topology:
    """Returns the topology called `text`: `v5e:4x4`, `v5p:2x2x2`, `h200`, `h200:8`, `cpu:8`.

    Args:
      text: name and shape.
      slices: how many of these, joined by the slow network.

    Raises:
      UsageError: no such hardware, or a shape that it does not come in.
    """
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, n=2)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UsageError(
            f"--topology={text}: known are {', '.join(CHIPS)}, as in {_EXAMPLES}{hint}"
        )
    chip = CHIPS[name]
    if chip.platform != "tpu" and not shape:
        shape = "1"
    numbers = tuple(map(int, re.findall(r"\d+", shape)))
    pattern = "x".join(["N"] * chip.dimensions)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or len(numbers) != chip.dimensions:
        raise UsageError(f"--topology={text}: accepted is {name}:{pattern}, as in {_EXAMPLES}")
    if not 1 <= math.prod(numbers) <= chip.most:
        raise UsageError(f"--topology={text}: accepted are 1 to {chip.most} of {name} in a slice")
    if slices < 1:
        raise UsageError(f"--slices={slices}: accepted is a whole number >= 1")
    return Topology(name, numbers, slices)


def environment(topology: Topology) -> dict[str, str]:
    """Returns the environment variables that must be set before jax is imported."""
    found = {"JAX_PLATFORMS": "cpu"}
    if topology.chip.platform == "tpu":
        # Nothing asks the cloud which machine this is; no lock, as no TPU is opened; the last two
        # keep libtpu from warning.
        found |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        found["TPU_WORKER_HOSTNAMES"] = "localhost"
        found["TPU_ACCELERATOR_TYPE"] = os.environ.get("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    elif topology.chip.platform == "gpu":
        found["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    else:
        flag = "--xla_force_host_platform_device_count"
        others = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
        count = math.prod(topology.shape) * topology.slices
        found["XLA_FLAGS"] = " ".join([*others, f"{flag}={count}"])
    return found


def mesh_for(topology: Topology, node: int = -1, device: int = -1) -> Any:
    """Returns the mesh ('node', 'device') that training lays out on this hardware.

    Args:
      topology: from `parse`.
      node: `mesh.node` of the config; -1 (with `device` -1): the slices.
      device: `mesh.device` of the config.

    Raises:
      UsageError: the compiler for it is not installed, it refuses the shape, or node x device does
        not fit.
    """
    from jaxmodels.core import partitioning

    devices = _devices(topology)
    if node == device == -1:
        node = topology.slices
    try:
        return partitioning.make_mesh(node, device, devices)
    except ValueError as error:
        raise UsageError(f"--topology={topology}: {error}") from error


def slice_of(topology: Topology, mesh: Any) -> list[int]:
    """Returns the slice (box, for GPUs) of each device of `mesh`, in its order."""
    devices = list(mesh.devices.flat)
    if topology.chip.platform == "tpu":
        return [getattr(d, "slice_index", None) or 0 for d in devices]
    if topology.chip.platform == "gpu":
        return [d.process_index for d in devices]
    return [d.id // math.prod(topology.shape) for d in devices]


def _devices(topology: Topology) -> list[Any]:
    """The described devices, of the type that jax compiles for."""
    import jax
    from jax.experimental import topologies

    chip, total = topology.chip, math.prod(topology.shape) * topology.slices
    if chip.platform == "cpu":
        if len(jax.devices("cpu")) < total:
            raise RuntimeError(f"jax was started with fewer than {total} CPU devices")
        return jax.devices("cpu")[:total]
    _check_installed(topology)
    try:
        if chip.platform == "gpu":
            values = {"kind": chip.kind, "memory": chip.memory, "bandwidth": int(chip.bandwidth)}
            target = _TARGET.format(**values, **chip.description)
            shape = f"1x{topology.slices}x{topology.shape[0]}"
            found = topologies.get_topology_desc("", "cuda", target_config=target, topology=shape)
        else:
            options = dict(chip.description)
            if math.prod(topology.shape) < 4:  # part of a host
                bounds = (*topology.shape, 1, 1)[:3]
                options["chips_per_host_bounds"] = bounds
            if topology.slices > 1:
                options["num_slices"] = topology.slices
            name = f"{topology.name}:{'x'.join(map(str, topology.shape))}"
            found = topologies.get_topology_desc(name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--topology={topology}: the compiler refuses it: {reason}") from error
    return list(found.devices)


def _check_installed(topology: Topology) -> None:
    """Raises UsageError where the compiler for this hardware is missing."""
    if topology.chip.platform == "tpu":
        modules, extra = ("libtpu",), "tpu"
    else:
        modules, extra = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "cuda13"
    if not any(_present(module) for module in modules):
        raise UsageError(
            f"--topology={topology}: the compiler for it is not installed; "
            f'pip install "jax[{extra}]" (no {topology.chip.platform.upper()} is needed)'
        )


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
