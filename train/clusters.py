"""Which processes make up this run: read from flags, else from what TPU pods, Slurm and MPI set.

jax can find this out by itself too, but not tell whether it should, and it ends the process with a
C++ trace where somebody is missing. What is found here is what jax would find.
"""

import dataclasses
import glob
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from train.errors import UsageError

# Ports that jax takes in these environments; JAX_COORDINATOR_PORT names another one.
_TPU_PORT = 8482
_LAST_PORTS = 2**12  # Slurm and Open MPI: one of the last so many, by the job's number

# Slurm numbers the steps that are no `srun` of a job (batch script, interactive shell) from here.
_FIRST_SPECIAL_STEP = 2**32 - 16


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of one run, seen from one of them.

    Attributes:
      address: HOST:PORT where process 0 is found; None where it is not known.
      processes: how many there are.
      index: which one this is.
      source: what said so, in words.
    """

    address: str | None
    processes: int
    index: int
    source: str


def find(
    address: str | None,
    processes: int | None,
    index: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Returns the processes of this run; None where it is a single one.

    A flag that is given wins over JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    these over what TPU pods, Slurm or Open MPI say.

    Raises:
      UsageError: what was given does not fit together, or leaves something unsaid.
    """
    address = address or _address_variable(environment)
    processes = _number(environment, "JAX_NUM_PROCESSES") if processes is None else processes
    index = _number(environment, "JAX_PROCESS_ID") if index is None else index
    if processes == 1 and not index and not address:
        return None
    found, source = None, "flags and JAX_ variables"
    if None in (address, processes, index) and processes != 1:
        found = _detect(environment)
    if (address, processes, index) == (None, None, None) and found is None:
        return None
    if found:
        source = found.source
        address = address or found.address
        processes = found.processes if processes is None else processes
        index = found.index if index is None else index
    elif processes == 1 and index is None:
        index = 0
    _check(address, processes, index, source)
    return Cluster(address, processes, index, source) if processes > 1 else None


def _address_variable(environment: Mapping[str, str]) -> str | None:
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    port = environment.get("JAX_COORDINATOR_PORT")
    return f"{address}:{port}" if address and port and ":" not in address else address


def _number(environment: Mapping[str, str], name: str) -> int | None:
    return _numbers(environment, [name])[0] if name in environment else None


def _check(address: str | None, processes: int | None, index: int | None, source: str) -> None:
    given = {"coordinator_address": address, "num_processes": processes, "process_id": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        known = [f"{name}={value}" for name, value in given.items() if value is not None]
        raise UsageError(
            f"{' and '.join(missing)} missing: {source} gave only {', '.join(known)}; several "
            f"processes need all of --coordinator_address=HOST:PORT, --num_processes, --process_id"
        )
    if processes < 1 or not 0 <= index < processes:
        raise UsageError(
            f"process_id={index} with num_processes={processes}: accepted is 0 to "
            f"num_processes - 1, and at least one process"
        )
    split_address(address)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT (an IPv6 host stands in brackets).

    Raises:
      UsageError: it is something else.
    """
    host, _, port = address.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bare = inner == host and ":" in host  # an IPv6 address without brackets: where does it end?
    allowed = inner and not any(c.isspace() or c in "/[]@" for c in inner)
    if bare or not allowed or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UsageError(
            f"coordinator_address={address}: accepted is HOST:PORT with a port of 1 to 65535, "
            f"like 10.0.0.1:1234 or [fd00::1]:1234"
        )
    return inner, int(port)


def _detect(environment: Mapping[str, str]) -> Cluster | None:
    """What the machine or its scheduler says; None where it speaks of one process."""
    for look in (_from_tpu, _from_slurm, _from_open_mpi):
        found = look(environment)
        if found is not None:
            return found if found.processes > 1 else None
    return None


def _from_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """A TPU slice of several hosts, or several slices: variables on GKE, metadata on TPU VMs."""
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu").split(","):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts and "TPU_WORKER_ID" in environment:
        hosts, worker = hosts.split(","), _numbers(environment, ["TPU_WORKER_ID"])[0]
        return _tpu_cluster(environment, hosts, worker, environment.get)
    if not has_tpu(environment):
        return None
    endpoints, worker = (_metadata(name, environment) for name in _METADATA[:2])
    if not endpoints or worker is None:
        return None
    # "name:id:address" triples in the older form, host names alone in the newer one.
    hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
    described = _tpu_description(_metadata(_METADATA[2], environment) or "")
    return _tpu_cluster(
        environment, hosts, int(worker), lambda name: environment.get(name) or described.get(name)
    )


_METADATA = ("worker-network-endpoints", "agent-worker-number", "tpu-env")


def has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this machine is a TPU VM that may ask its metadata server what it belongs to."""
    if "TPU_SKIP_MDS_QUERY" in environment or not importlib.util.find_spec("libtpu"):
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _tpu_cluster(
    environment: Mapping[str, str],
    hosts: list[str],
    worker: int,
    value_of: Callable[[str], str | None],
) -> Cluster:
    slices = int(value_of("MEGASCALE_NUM_SLICES") or 1)
    number = int(value_of("MEGASCALE_SLICE_ID") or 0)
    first = (value_of("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    port = environment.get("JAX_COORDINATOR_PORT", _TPU_PORT)
    what = f"the TPU environment ({slices} slices)" if slices > 1 else "the TPU environment"
    return Cluster(f"{first}:{port}", len(hosts) * slices, worker + number * len(hosts), what)


def _metadata(name: str, environment: Mapping[str, str]) -> str | None:
    """One attribute of this virtual machine; None where it has none."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def _tpu_description(text: str) -> dict[str, str]:
    """The lines NAME: 'value' of the `tpu-env` attribute."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip().strip("'") for name, value in pairs}


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """A step of several tasks: `srun` sets it up. A shell of `salloc` or a batch script is none."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_STEP_ID")
    if any(name not in environment for name in needed):
        return None
    job, step = _numbers(environment, ["SLURM_JOB_ID", "SLURM_STEP_ID"])
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if step >= _FIRST_SPECIAL_STEP or count not in environment:
        return None
    tasks, index = _numbers(environment, [count, "SLURM_PROCID"])
    host = _first_of_node_list(environment["SLURM_STEP_NODELIST"])
    return Cluster(f"{host}:{_port(environment, job)}", tasks, index, f"Slurm ({count})")


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of this process by number, where several processes see the same ones.

    That is so in a Slurm step with several tasks a node that were not bound to GPUs of their own:
    each then takes one. None leaves a process all devices that it sees.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].split(",")[0]
    place = environment.get("SLURM_LOCALID", "")
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    shared = tasks.isdecimal() and place.isdecimal() and int(tasks) > 1
    if not shared or "SLURM_STEP_NODELIST" not in environment or len(visible) < int(tasks):
        return None
    return [int(place)]


def _first_of_node_list(nodes: str) -> str:
    """`node[007-015,020],other` -> `node007`."""
    head, bracket, rest = nodes.partition("[")
    if "," in head or not bracket:
        return head.split(",")[0]
    digits = rest.replace("-", ",").replace("]", ",").split(",")[0]
    return head + digits


def _from_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    """`mpirun` with several ranks. Its address is known before Open MPI 5 only."""
    names = ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"]
    if any(name not in environment for name in names):
        return None
    size, rank = _numbers(environment, names)
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    job, _, uri = environment.get("OMPI_MCA_orte_hnp_uri", "").partition(".")
    _, _, hosts = uri.partition("://")
    address = None
    if job.isdecimal() and hosts:
        host = hosts.split("]")[0] + "]" if hosts.startswith("[") else hosts.split(":")[0]
        first = host.split(",")[0]
        first += "]" if first.startswith("[") and not first.endswith("]") else ""
        address = f"{first}:{_port(environment, int(job) // _LAST_PORTS)}"
    return Cluster(address, size, rank, "Open MPI (OMPI_COMM_WORLD_SIZE)")


def _port(environment: Mapping[str, str], job: int) -> str:
    return environment.get("JAX_COORDINATOR_PORT", str(65536 - _LAST_PORTS + job % _LAST_PORTS))


def _numbers(environment: Mapping[str, str], names: list[str]) -> list[int]:
    for name in names:
        if not environment[name].isdecimal():
            raise UsageError(f"{name}={environment[name]}: accepted is a whole number >= 0")
    return [int(environment[name]) for name in names]
