"""The processes of a run meet before jax connects them: who is missing is then said in words.

jax's own client ends the process with a C++ trace when a peer does not come. So process 0 first
answers on the same port itself, until everybody has called, and leaves the port to jax.
"""

import errno
import json
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from train.clusters import Cluster, split_address
from train.errors import RunError

_GREETING = "jaxmodels"
_PATIENCE = 0.2  # seconds between two looks at a door that is shut
_FIRST_ANSWER = 10.0  # seconds in which process 0, once connected to, must have said something
_REMIND = 15.0  # seconds after which process 0 says whom it waits for


def meet(cluster: Cluster, timeout: float, say: Callable[[str], None] = print) -> None:
    """Returns on every process once all are there.

    Args:
      cluster: all processes of the run; its address must be known.
      timeout: seconds that processes wait for one another.
      say: shows a line to the user.

    Raises:
      RunError: somebody did not come in time; says who, where and after how many seconds.
    """
    if cluster.index == 0:
        _Host(cluster, timeout, say).run()
    else:
        _call(cluster, timeout)


class _Host:
    """Process 0: counts those that call, then tells all of them how it went."""

    def __init__(self, cluster: Cluster, timeout: float, say: Callable[[str], None]):
        self._cluster, self._timeout, self._say = cluster, timeout, say
        self._start = time.monotonic()
        self._callers: dict[socket.socket, int | None] = {}  # None: has not said who it is
        self._texts: dict[socket.socket, bytes] = {}
        self._ears = selectors.DefaultSelector()

    def run(self) -> None:
        """Raises RunError where not all came."""
        listener = self._listen()
        self._ears.register(listener, selectors.EVENT_READ)
        try:
            problem = self._gather(listener)
        finally:
            self._ears.close()
            listener.close()  # before anybody is told: jax listens on this port next
        for caller in self._callers:
            _send(caller, {"go": problem is None, "problem": problem})
        for caller in self._callers:
            _wait_for_goodbye(caller)
            caller.close()
        if problem:
            raise RunError(problem)

    def _listen(self) -> socket.socket:
        """The port of the run; waits for an earlier run of this host to let go of it."""
        _, port = split_address(self._cluster.address)
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        while True:
            try:
                return socket.create_server(
                    ("", port),
                    family=family,
                    backlog=self._cluster.processes,
                    dualstack_ipv6=family == socket.AF_INET6,
                )
            except OSError as error:
                if error.errno != errno.EADDRINUSE or self._waited() > min(self._timeout, 30):
                    raise RunError(
                        f"process 0 cannot listen on port {port} ({error.strerror}): another "
                        f"program or run has it; give --coordinator_address another port"
                    ) from None
            time.sleep(_PATIENCE)

    def _waited(self) -> float:
        return time.monotonic() - self._start

    def _gather(self, listener: socket.socket) -> str | None:
        """Returns None once all have called, else what is wrong."""
        reminded = False
        while missing := self._missing():
            if self._waited() > self._timeout:
                return (
                    f"{_named(missing)} of {self._cluster.processes} did not come to process 0 at "
                    f"{self._cluster.address} within {self._timeout:g} s "
                    f"(distributed.timeout_seconds): look at its log, start all again"
                )
            if not reminded and self._waited() > _REMIND:
                reminded = True
                self._say(f"waiting for {_named(missing)} of {self._cluster.processes}")
            for key, _ in self._ears.select(_PATIENCE):
                heard = key.fileobj
                problem = self._welcome(listener) if heard is listener else self._hear(heard)
                if problem:
                    return problem
        return None

    def _missing(self) -> list[int]:
        return sorted(set(range(1, self._cluster.processes)) - set(self._callers.values()))

    def _welcome(self, listener: socket.socket) -> None:
        caller, _ = listener.accept()
        caller.settimeout(_FIRST_ANSWER)
        self._callers[caller], self._texts[caller] = None, b""
        self._ears.register(caller, selectors.EVENT_READ)
        _send(caller, {"greeting": _GREETING})

    def _hear(self, caller: socket.socket) -> str | None:
        """Takes what a caller says; one that hangs up or talks nonsense is forgotten."""
        try:
            received = caller.recv(4096)
        except OSError:
            received = b""
        self._texts[caller] += received
        text, ended, _ = self._texts[caller].partition(b"\n")
        if received and not ended and len(text) < 4096:
            return None
        said = _parsed(text)
        if not received or said.get("greeting") != _GREETING:
            del self._callers[caller], self._texts[caller]
            self._ears.unregister(caller)
            caller.close()
            return None
        return self._note(caller, said)

    def _note(self, caller: socket.socket, said: dict[str, Any]) -> str | None:
        index, processes = said["index"], said["processes"]
        if processes != self._cluster.processes:
            return (
                f"process {index} was started as one of {processes} processes, process 0 as one "
                f"of {self._cluster.processes}: start all with the same --num_processes"
            )
        if index == 0 or index in self._callers.values():
            return f"two processes were started as process {index}: give each its own --process_id"
        self._callers[caller] = index
        return None


def _call(cluster: Cluster, timeout: float) -> None:
    """Any other process: calls process 0 until it answers, then waits for its word."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _ask(cluster, timeout)
        except OSError as error:  # nobody there yet, or an earlier run's process 0 still leaving
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise RunError(
                f"process {cluster.index} of {cluster.processes} did not find process 0 at "
                f"{cluster.address} within {timeout:g} s (distributed.timeout_seconds): {reason}; "
                f"look whether process 0 runs there and whether its port can be reached"
            )
        time.sleep(_PATIENCE)


def _ask(cluster: Cluster, timeout: float) -> None:
    """One attempt. Raises OSError where another is worth it, RunError where process 0 says no."""
    with socket.create_connection(split_address(cluster.address), timeout=5) as line:
        hello = {"greeting": _GREETING, "index": cluster.index, "processes": cluster.processes}
        _send(line, hello)
        line.settimeout(_FIRST_ANSWER)
        reader = line.makefile("rb")
        if _parsed(reader.readline(4096)).get("greeting") != _GREETING:
            raise ConnectionError("another program answers there")
        line.settimeout(timeout + _FIRST_ANSWER)  # process 0 gives up before
        verdict = _parsed(reader.readline(4096))
    if "go" not in verdict:
        raise ConnectionError("process 0 hung up")
    if not verdict["go"]:
        raise RunError(verdict["problem"])


def _send(line: socket.socket, message: dict[str, Any]) -> None:
    try:
        line.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # it is gone: whoever waits for it will say so


def _wait_for_goodbye(line: socket.socket) -> None:
    """Lets the caller hang up first: the port is then free at once."""
    try:
        line.settimeout(1.0)
        line.recv(1)
    except OSError:
        pass


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process {shown}" if len(processes) == 1 else f"processes {shown}"
