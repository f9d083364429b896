"""One run at a time in a folder: a lock file that says who holds it, kept fresh while they live.

Whether the holder still lives is known at once where it shares our machine and process numbers
(its process is there, and was started when the lock says). Elsewhere (another machine, a container
with process numbers of its own, a machine since rebooted) a file that changes is held, and one that
has not for two minutes is not. It is watched for two beats at least: clocks may differ.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from train import storage
from train.errors import UsageError
from train.storage import Say

FILE = "lock.json"
BEAT = 20.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which a holder counts as dead
# A holder silent for this long by the clocks themselves is not waited for: no two differ so much.
_LONG_SILENT = 3600.0
_LOOK = 2.0  # seconds between two looks at a lock that may be stale
_SETTLE = 2.0  # seconds in which a second writer of the same lock would show
_FAILURES = 3  # beats in a row that cannot be written before it is said


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
      token: drawn anew for each lock taken.
      host: name of the machine.
      kernel: names the booted machine and the space of process numbers; "" where not known.
      pid: process number.
      started: when the process was started, in the system's own words; "" where not known.
      since: when the lock was taken, ISO 8601.
      time: seconds of the epoch at the last sign of life.
    """

    token: str
    host: str
    kernel: str
    pid: int
    started: str
    since: str
    time: float

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class Lock:
    """Holds a run's folder against other runs, as a context manager.

    Attributes:
      lost: None, or why the lock is no longer ours; said once when it is noticed.
    """

    def __init__(self, workdir: epath.PathLike, say: Say = print):
        """Names the folder, which exists; nothing is written yet."""
        self.lost: str | None = None
        self._workdir = workdir
        self._path = storage.folder(workdir) / FILE
        self._say = say
        self._me = _myself()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0

    def __enter__(self) -> "Lock":
        """Takes the lock; waits up to two minutes to see whether an unknown holder lives.

        Raises:
          UsageError: another run holds it; the message names host, process and time.
        """
        with _alone(self._path.parent) as settled:
            self._await_free()
            self._write()
        if not settled:
            time.sleep(_SETTLE)
        holder, _ = _read(self._path)
        if holder is None or holder.token != self._me.token:
            raise self._refusal(holder)
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back, unless it became another's."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(BEAT)
        with contextlib.suppress(Exception):  # a lock left behind is found to be dead
            holder, _ = _read(self._path)
            if holder is not None and holder.token == self._me.token:
                self._path.unlink()

    def _await_free(self) -> None:
        """Returns when the folder has no lock, or one whose holder is dead."""
        if not self._path.exists():
            return
        first = _read(self._path)
        holder, _ = first
        alive = _alive(holder, self._me)
        if alive:
            raise self._refusal(holder)
        if alive is None and not self._watch(first):
            return
        why = "its process is gone" if alive is False else "it shows no sign of life"
        self._say(f"taking over the lock of {holder or 'an unreadable file'}: {why}")

    def _watch(self, first: tuple[Holder | None, Any]) -> bool:
        """Returns whether a lock is still there, unchanged, when its holder must be dead."""
        silent = max(_silent(first), 0.0)
        if silent > _LONG_SILENT:
            return True
        seconds = min(max(STALE - silent, 2.5 * BEAT), STALE)
        self._say(
            f"{self._workdir} has the lock of {first[0] or 'a holder that cannot be read'}: "
            f"watching it up to {seconds:.0f} s for a sign of life"
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(_LOOK, BEAT))
            if not self._path.exists():
                return False
            now = _read(self._path)
            if now != first:
                raise self._refusal(now[0])
        return True

    def _refusal(self, holder: Holder | None) -> UsageError:
        return UsageError(
            f"--workdir={self._workdir} is in use by another run: {holder or 'unknown'}; wait for "
            f"it, stop it, or give another --workdir"
        )

    def _write(self) -> None:
        self._me = dataclasses.replace(self._me, time=time.time())
        storage.write(self._path, json.dumps(dataclasses.asdict(self._me), indent=2) + "\n")

    def _beat(self) -> None:
        while not self._over.wait(BEAT) and self.lost is None:
            try:
                self._refresh()
                self._failures = 0
            except Exception as error:
                self._failures += 1
                if self._failures == _FAILURES:
                    self._say(
                        f"warning: {self._path} cannot be refreshed ({storage.describe(error)}); "
                        f"a run on another machine may take the folder for free"
                    )

    def _refresh(self) -> None:
        if not self._path.exists():
            if self._over.is_set():
                return
            self._say(f"warning: {self._path} was removed while this run uses the folder: restored")
            self._write()
            return
        holder, _ = _read(self._path)
        if holder is None or holder.token != self._me.token:
            self.lost = f"{self._path} was replaced by another run: {holder or 'unknown'}"
            self._say(f"warning: {self.lost}; two runs may be writing to this folder")
        elif storage.is_remote(self._path):
            self._write()
        else:
            os.utime(self._path)  # needs no space, so that a full disk does not look like death


def _myself() -> Holder:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    token = secrets.token_hex(8)
    return Holder(token, socket.gethostname(), _kernel(), pid, _started(pid), now, time.time())


def _kernel() -> str:
    """The boot and the space of process numbers: equal names of hosts are not enough."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started; "" where it is gone, a zombie, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # macOS
        told = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10
        )
        return told.stdout.strip()
    return ""


def _alive(holder: Holder | None, me: Holder) -> bool | None:
    """Whether the holder lives; None where that cannot be told from here."""
    if holder is None or holder.host != me.host or holder.kernel != me.kernel:
        return None
    if holder.started and me.started:
        return _started(holder.pid) == holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _read(path: epath.Path) -> tuple[Holder | None, Any]:
    """The holder (None where the file cannot be understood), and what changes at a sign of life."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None, None
    changing: Any = text
    if not storage.is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            changing = text, os.stat(path).st_mtime_ns
    try:
        values = json.loads(text)
        fields = {field.name: values[field.name] for field in dataclasses.fields(Holder)}
        return Holder(**fields), changing
    except (ValueError, KeyError, TypeError):
        return None, changing


def _silent(seen: tuple[Holder | None, Any]) -> float:
    """Seconds since the last sign of life by the clocks; 0 where the file does not say."""
    holder, changing = seen
    last = changing[1] / 1e9 if isinstance(changing, tuple) else holder.time if holder else None
    return 0.0 if last is None else time.time() - last


@contextlib.contextmanager
def _alone(place: epath.Path) -> Iterator[bool]:
    """Keeps other processes of this machine from taking the lock meanwhile; False where it cannot.

    The wait for a holder's sign of life happens inside: a second comer waits for the first one.
    """
    if storage.is_remote(place):
        yield False
        return
    try:
        import fcntl

        handle = os.open(place, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        except OSError:  # some network file systems
            held = False
        yield held
    finally:
        os.close(handle)
