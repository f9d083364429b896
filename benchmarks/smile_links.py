"""Nodes of a cluster on one machine: network namespaces joined by links of a given rate.

A node is a namespace with one interface, eth0, whose other end is a port of a bridge in one more
namespace, the hub. `tc tbf` shapes both ends: a node sends at the rate, and receives at it. Needs
root and `ip` and `tc` (iproute2) on Linux. Nothing outside these namespaces is changed, but for
/etc/netns/NAME/hosts, which `ip netns exec` lays over /etc/hosts: gloo listens on the address that
the host's name has. Names carry the process that made them, so that what a killed one left behind
is known, and removed at the next start.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PREFIX = "smile-links"
QUEUE_MS = 50  # deep: shallow queues measure TCP's retransmissions, not the exchange
_HOSTS = Path("/etc/netns")
_SECONDS = 20  # no command takes one


class LinksError(RuntimeError):
    """A namespace or a link could not be made; the message holds the command and what it said."""


@dataclasses.dataclass(frozen=True)
class Links:
    """N nodes and the hub.

    Attributes:
      nodes: N, at most 200.
      rate_mbit: of a node, each way; 0: as fast as the machine.
      pid: of the process that they belong to.
    """

    nodes: int
    rate_mbit: float = 1000.0
    pid: int = dataclasses.field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 200 or self.rate_mbit < 0:
            raise ValueError(
                f"{self.nodes} nodes at {self.rate_mbit} mbit: accepted are 1 to 200 nodes and a "
                "rate of 0 (not shaped) or more."
            )

    @property
    def hub(self) -> str:
        """The namespace of the bridge."""
        return f"{PREFIX}-{self.pid}-hub"

    def name(self, node: int) -> str:
        """The namespace of a node."""
        return f"{PREFIX}-{self.pid}-{node}"

    def address(self, node: int) -> str:
        """The address of a node on its link."""
        return f"10.77.0.{node + 1}"

    def inside(self, node: int, command: Sequence[str]) -> list[str]:
        """Returns what runs `command` inside a node."""
        return ["ip", "netns", "exec", self.name(node), *command]

    def commands(self) -> list[list[str]]:
        """Returns the commands that make the namespaces and links, in order."""
        made = [
            f"ip netns add {self.hub}",
            f"ip -n {self.hub} link add br0 type bridge",
            f"ip -n {self.hub} link set br0 up",
        ]
        for node in range(self.nodes):
            own, port = self.name(node), f"node{node}"
            made += [
                f"ip netns add {own}",
                f"ip -n {own} link set lo up",
                f"ip -n {own} link add eth0 type veth peer name {port} netns {self.hub}",
                f"ip -n {self.hub} link set {port} master br0",
                f"ip -n {self.hub} link set {port} up",
                f"ip -n {own} addr add {self.address(node)}/24 dev eth0",
                f"ip -n {own} link set eth0 up",
            ]
            if self.rate_mbit:
                made += [
                    f"tc -n {own} {self._shape('eth0')}",
                    f"tc -n {self.hub} {self._shape(port)}",
                ]
        return [command.split() for command in made]

    def _shape(self, interface: str) -> str:
        burst = max(256, round(self.rate_mbit))  # kbit: about a millisecond at full rate
        rate = f"rate {self.rate_mbit:g}mbit burst {burst}kbit latency {QUEUE_MS}ms"
        return f"qdisc add dev {interface} root tbf {rate}"

    def make(self) -> None:
        """Makes them.

        Raises:
          LinksError: a command failed; what was made so far stays, see `joined`.
        """
        for command in self.commands():
            _run(command)
        for node in range(self.nodes):
            folder = _HOSTS / self.name(node)
            folder.mkdir(parents=True)
            host = socket.gethostname()
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.address(node)} {host}\n")
            # Reno in a deep queue disturbs least. Where it may not be chosen the default stays;
            # what is in force is read by the nodes and recorded.
            choose = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"
            subprocess.run(self.inside(node, ["sh", "-c", choose]), **_quiet())


def _quiet() -> dict[str, Any]:
    # A session of its own: Ctrl-C in a terminal must not end a command half way.
    return {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "timeout": _SECONDS,
        "start_new_session": True,
    }


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, **_quiet())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinksError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise LinksError(f"{' '.join(command)}: {done.stdout.strip() or done.returncode}")
    return done.stdout


def present() -> dict[str, int]:
    """Returns {namespace: process it belongs to} of all namespaces that this module made."""
    found = {}
    for line in _run(["ip", "netns", "list"]).splitlines():
        match = re.fullmatch(rf"({PREFIX}-(\d+)-\w+)(?: \(id: \d+\))?", line.strip())
        if match:
            found[match[1]] = int(match[2])
    return found


def remove(pid: int) -> None:
    """Removes the namespaces and files of a process; does all it can before it raises."""
    failed = []
    for name in (name for name, owner in present().items() if owner == pid):
        try:
            _run(["ip", "netns", "delete", name])  # its links go with it
        except LinksError as error:
            if name in present():  # not removed by another process in the meantime
                failed.append(error)
    for folder in _HOSTS.glob(f"{PREFIX}-{pid}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may have theirs in it
        _HOSTS.rmdir()
    if failed:
        raise failed[0]


def remove_leftovers() -> list[int]:
    """Removes what processes left that are no more; returns their ids."""
    gone = sorted(pid for pid in set(present().values()) if not _alive(pid))
    for pid in gone:
        remove(pid)
    return gone


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def joined(nodes: int, rate_mbit: float) -> Iterator[Links]:
    """Makes namespaces and links, and removes them however the block ends.

    SIGTERM ends the block like Ctrl-C does; after SIGKILL the next call removes what was left.

    Raises:
      LinksError: not permitted, or no such tool.
    """
    links = Links(nodes, rate_mbit)
    remove_leftovers()
    with _handled(signal.SIGTERM, _leave):
        try:
            links.make()
            yield links
        finally:
            with _handled(signal.SIGINT, signal.SIG_IGN), _handled(signal.SIGTERM, signal.SIG_IGN):
                remove(links.pid)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may; signals are then the caller's concern
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def unavailable() -> str | None:
    """Returns why links cannot be made here, in one line; None where they can (it is tried)."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; they are in the package iproute2"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with joined(1, 1000):
            return None
    except (LinksError, OSError) as error:
        return " ".join(str(error).split())
