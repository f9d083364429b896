"""Several processes as one run: joining them, agreeing between them, leaving together."""

import hashlib
import json
import os
import pathlib
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from train import clusters, rendezvous
from train.errors import RunError, UsageError

T = TypeVar("T")

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CODE = ("jaxmodels", "kernels_pallas", "train", "configs")
_LIBRARIES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "grain")

# Seconds to wait for the others before leaving with a failure: they may never come.
_GRACE = 5.0


def initialize(
    coordinator: str | None,
    processes: int | None,
    index: int | None,
    timeout_seconds: int,
    heartbeat_seconds: int,
) -> None:
    """Joins the processes of this run, where flags or environment speak of several.

    The environments known are TPU pods and slices (virtual machines and GKE), Slurm steps, Open
    MPI, and JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process, or
    one that has joined already, is left as it is.

    Args:
      coordinator: HOST:PORT of process 0; None where the environment says it.
      processes: how many; None as above.
      index: of this process, from 0; None as above.
      timeout_seconds: that processes wait for one another here.
      heartbeat_seconds: of silence after which a process counts as dead.

    Raises:
      UsageError: the flags do not fit together, or leave something unsaid.
      RunError: not all processes came in time; says which ones.
    """
    if jax.distributed.is_initialized():
        return
    cluster = clusters.find(coordinator, processes, index)
    if cluster is None:
        return
    rendezvous.meet(cluster, timeout_seconds, lambda text: print(text, flush=True))
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.processes,
            cluster.index,
            clusters.local_devices(os.environ),
            cluster_detection_method="deactivate",  # it would give a Slurm task one GPU of many
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"the processes at {cluster.address} cannot be joined: {reason}") from error
    if cluster.index == 0:
        print(
            f"{cluster.processes} processes joined at {cluster.address} by {cluster.source}; one "
            f"silent for {heartbeat_seconds} s counts as dead: all others then leave (status 1, or "
            f"134 after a C++ trace), and the same commands resume the run",
            flush=True,
        )


def first(function: Callable[[], Any]) -> Any:
    """Runs `function` on process 0 alone; every process returns its JSON value.

    Every process must call it. An exception on process 0 is raised there as it is; on the others
    as a UsageError if it was one, else as a RunError.
    """
    if jax.process_count() == 1:
        return function()
    error: Exception | None = None
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except Exception as caught:  # the others wait for an answer, whatever happened
            error, answer = caught, _told(caught)
    answer = gather(answer)[0]
    if error is not None:
        raise error
    _raise_told(answer, 0)
    return answer["value"]


def together(function: Callable[[], T]) -> T:
    """Runs `function` on every process and returns its own value, once all have succeeded.

    Every process must call it. Where it fails somewhere, all raise: the process's own exception,
    else that of the lowest process that failed (a UsageError if it was one, else a RunError).
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    try:
        value = function()
    except Exception as caught:  # the others wait for an answer, whatever happened
        error = caught
    answers = gather(_told(error) if error else {})
    if error is not None:
        raise error
    for index, answer in enumerate(answers):
        _raise_told(answer, index)
    return value


def _told(error: Exception) -> dict[str, str]:
    """What the other processes hear of an exception."""
    known = isinstance(error, UsageError | RunError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return {"usage" if isinstance(error, UsageError) else "error": text}


def _raise_told(answer: Mapping[str, Any], index: int) -> None:
    if "usage" in answer:
        raise UsageError(f"process {index}: {answer['usage']}")
    if "error" in answer:
        raise RunError(f"process {index}: {answer['error']}")


def same_everywhere(what: str, values: Mapping[str, Any]) -> None:
    """Compares `values`, the source code and the libraries' versions of all processes.

    Args:
      what: names the values in the message ("config").
      values: {name: anything JSON can hold}, a few thousand at most.

    Raises:
      UsageError: on all processes, where some differ: each name, and who has which value.
    """
    if jax.process_count() == 1:
        return
    mine = {f"{what}.{name}": value for name, value in values.items()} | versions()
    found = gather(mine)
    names = sorted(set().union(*found))
    lines = [f"{n} is {_who_has_what([f.get(n, 'absent') for f in found])}" for n in names]
    differing = [
        line
        for name, line in zip(names, lines, strict=True)
        if any(f.get(name, "absent") != found[0].get(name, "absent") for f in found)
    ]
    if differing:
        more = f"; and {len(differing) - 10} more" if len(differing) > 10 else ""
        raise UsageError(
            f"the processes of this run were not started alike: {'; '.join(differing[:10])}{more}"
        )


def _who_has_what(values: list[Any]) -> str:
    """`0.1 on process 0 and 2, 0.2 on process 1`."""
    owners: dict[str, list[str]] = {}
    for index, value in enumerate(values):
        text = value if isinstance(value, str) else json.dumps(value)
        owners.setdefault(text, []).append(str(index))
    return ", ".join(f"{text} on process {' and '.join(who)}" for text, who in owners.items())


def versions() -> dict[str, str]:
    """Returns the versions that must agree: a digest of our source code, Python, the libraries."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode() + path.read_bytes())
    found = {"source code": digest.hexdigest()[:12], "Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def gather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in their order. Every process must call it."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with jax.transfer_guard("allow"):
        sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
        sent = np.zeros(int(sizes.max()), np.uint8)
        sent[: data.size] = data
        rows = np.asarray(multihost_utils.process_allgather(sent))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def lost_peer(error: BaseException) -> RunError | None:
    """Returns a one-line error where `error` means that another process has gone, else None."""
    text = " ".join(str(error).split())
    if not jax.distributed.is_initialized() or not any(s in text for s in _SIGNS_OF_LOSS):
        return None
    return RunError(
        f"process {jax.process_index()} lost another process of this run, which died or left; its "
        f"own log says why; the same commands on all resume the run ({text[:120]})"
    )


# What collectives say when a connection breaks: gloo between CPUs, NCCL, the coordination service.
_SIGNS_OF_LOSS = (
    "Gloo",
    "Connection reset by peer",
    "Connection closed by peer",
    "remote process exited",
    "heartbeat timeout",
    "coordination service",
)


def leave(status: int) -> NoReturn:
    """Leaves with `status`, together with the other processes where there are any.

    After success (0) and after a stop by a signal (143) the others are waited for, as they may
    still be writing. After a failure they get a few seconds: they may be stuck for good.
    """
    if jax.distributed.is_initialized():
        # jax holds its service's handler of SIGTERM until the end of the process; it stays.
        leaving = threading.Thread(target=_shut_down, daemon=True)
        leaving.start()
        leaving.join(None if status in (0, 143) else _GRACE)
        if leaving.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    raise SystemExit(status)


def _shut_down() -> None:
    try:
        jax.distributed.shutdown()
    except Exception as error:  # a peer that has gone: this process is done all the same
        reason = " ".join(str(error).split())[:200]
        print(f"warning: left without the other processes: {reason}", file=sys.stderr, flush=True)
