"""Starts N processes of one run on this machine, as a cluster would; none is left behind."""

import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[2]
# What clusters set; a test that is itself run under Slurm must not hand them on.
_FOREIGN = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS")


def free_port() -> int:
    """A port that nobody listens on, below those that the system hands out for connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class Process:
    """One process of a run: its number, what it printed, and how it ended."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        log: pathlib.Path,
        root: pathlib.Path = ROOT,
        devices: int = 1,
        **environment: str,
    ):
        """Starts it in `root`; both outputs go to `log`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
        flags = f"{kept.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()} | environment
        self.index, self.log = index, log
        with log.open("w") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *command],
                cwd=root,
                env=kept | {"PYTHONUNBUFFERED": "1"} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def error(self) -> str:
        """Its last line that begins with "error: "; empty where there is none."""
        found = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return found[-1] if found else ""

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Returns its exit status (128 + signal where one killed it)."""
        status = self.popen.wait(max(seconds, 0.1))
        return 128 - status if status < 0 else status


class Group:
    """The processes of one run."""

    def __init__(self, processes: list[Process]):
        """Takes processes that were started."""
        self.processes = processes

    def __getitem__(self, index: int) -> Process:
        return self.processes[index]

    def wait(self, seconds: float = 90) -> list[int]:
        """Returns the exit statuses; fails with all logs where one is still there in the end."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.logs()}") from None

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Returns once the condition holds; fails with all logs where it never does."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = all(process.popen.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"this never came: {condition}\n{self.logs()}")
            time.sleep(0.02)

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(f"--- process {p.index}\n{p.text[-2500:]}" for p in self.processes)

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait()


@contextlib.contextmanager
def started(
    count: int,
    folder: pathlib.Path,
    *command: str,
    devices: int = 1,
    extra: dict[int, Sequence[str]] | None = None,
    roots: dict[int, pathlib.Path] | None = None,
    leave_out: Sequence[int] = (),
    port: int | None = None,
    **environment: str,
) -> Iterator[Group]:
    """Starts `python COMMAND` in `count` processes that are told of one another by flags.

    Args:
      count: processes of the run.
      folder: where the logs go.
      command: the same on all.
      devices: simulated devices of each.
      extra: further arguments by process.
      roots: where the source code lies, by process; here by default.
      leave_out: processes that are not started, though the others expect them.
      port: of process 0; a free one by default.
      environment: further variables of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{port or free_port()}"
    joining = [f"--coordinator_address={address}", f"--num_processes={count}"]
    group = Group([])
    try:
        for i in range(count):
            if i in leave_out:
                continue
            own = [*command, *joining, f"--process_id={i}", *(extra or {}).get(i, [])]
            log = folder / f"process_{i}.log"
            root = (roots or {}).get(i, ROOT)
            group.processes.append(Process(i, own, log, root, devices, **environment))
        yield group
    finally:
        group.kill()


def run(count: int, folder: pathlib.Path, *command: str, **settings: object) -> Group:
    """As `started`, and waits until all have ended; fails where one did not end with 0."""
    with started(count, folder, *command, **settings) as group:
        statuses = group.wait()
    assert statuses == [0] * count, f"statuses {statuses}\n{group.logs()}"
    return group
