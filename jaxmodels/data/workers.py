"""The worker processes of an iterator: which is which, whether they live, and how they end."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# What an exit by a signal usually means; the system tells no more than the signal.
_CAUSES = {
    signal.SIGKILL: "killed by hand, or by the system for want of memory",
    signal.SIGBUS: "usually no space left in shared memory: /dev/shm is full or small",
    signal.SIGSEGV: "a fault in a native library",
}
_UNSEEN = "ended before anybody looked"


class WorkerError(RuntimeError):
    """A data worker died, or failed where no record is at fault; the message names it."""


class _Worker(NamedTuple):
    """A worker that has started; `process` is None where it ended before anybody looked."""

    pid: int
    process: Any

    @property
    def ending(self) -> str | None:
        """How it ended; None while it lives."""
        if self.process is None:
            return _UNSEEN
        code = self.process.exitcode
        return None if code is None else _ending(code)


class Workers:
    """Finds the workers that some library starts, by the pid that each leaves in a folder."""

    def __init__(self, count: int) -> None:
        """Prepares for `count` workers, each started with `initialize`."""
        self.count = count
        self._folder = Path(tempfile.mkdtemp(prefix="jaxmodels-workers-"))
        self._found: dict[int, _Worker] = {}
        self._lock = threading.Lock()

    @property
    def initialize(self) -> Callable[[int, int], None]:
        """The function (index, count) to call first in each worker."""
        return functools.partial(_start_worker, str(self._folder))

    def notice(self) -> None:
        """Finds out who has started meanwhile; costs nothing once all have."""
        with self._lock:
            if len(self._found) == self.count:
                return
            missing = [index for index in range(self.count) if index not in self._found]
            pids = {index: self._pid(index) for index in missing}
            children = {child.pid: child for child in multiprocessing.active_children()}
            for index, pid in pids.items():
                if pid is not None:
                    self._found[index] = _Worker(pid, children.get(pid))

    def dead(self, said: str = "") -> str | None:
        """Returns the names of workers that ended, with the reason; None while all live.

        Args:
          said: a message with the exit code, for a worker that ended before anybody looked.
        """
        self.notice()
        ended = [i for i, worker in sorted(self._found.items()) if worker.ending]
        found = "; ".join(map(self.describe, ended))
        code = re.search(r"exit code (-?\d+)", said)
        return (found.replace(_UNSEEN, _ending(int(code[1]))) if code else found) or None

    def describe(self, index: int) -> str:
        """Returns "data worker 1 of 4 (pid 4711): alive"."""
        self.notice()
        worker = self._found.get(index)
        if worker is None:
            return f"data worker {index} of {self.count}: not started yet"
        return f"data worker {index} of {self.count} (pid {worker.pid}): {worker.ending or 'alive'}"

    def kill(self) -> None:
        """Ends all workers at once; whoever waits for one of them gets an error."""
        self.notice()
        for worker in self._found.values():
            if worker.process is not None and worker.process.exitcode is None:
                worker.process.kill()

    def stop(self, close: Callable[[], None], patience: float = 5.0) -> None:
        """Lets `close` end the workers, and kills those that have not ended after `patience` s."""
        self.notice()
        closing = threading.Thread(target=_quietly, args=(close,), name="close-data", daemon=True)
        try:
            closing.start()
        except RuntimeError:  # at the exit of the interpreter no thread starts any more
            self.kill()
            _quietly(close)
        else:
            closing.join(patience)
            if closing.is_alive():
                self.kill()
                closing.join(patience)
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _pid(self, index: int) -> int | None:
        try:
            return int((self._folder / str(index)).read_text())
        except (OSError, ValueError):
            return None


def portable(error: Exception) -> Exception:
    """Returns `error`, or a WorkerError with its text where it cannot travel between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        return WorkerError(f"{type(error).__name__} in a data worker: {error}{notes}")
    return error


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-exitcode)
        return f"was ended by {name.name}" + (f" ({_CAUSES[name]})" if name in _CAUSES else "")
    return f"was ended by signal {-exitcode}"


def _quietly(close: Callable[[], None]) -> None:
    # What the library says about workers that have been killed is no news.
    with contextlib.suppress(Exception):
        close()


def _start_worker(folder: str, index: int, count: int) -> None:
    """Runs first in a worker: makes it known, and ties its life to the parent's alone."""
    del count
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators are the parent's
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Signals to the whole group (Ctrl-C, a scheduler's notice) are for the parent to handle: it
    # needs batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = threading.Thread(target=_leave_with_parent, args=(folder,), daemon=True)
    watch.start()
    place = Path(folder) / str(index)
    with contextlib.suppress(OSError):  # the parent closed already
        place.with_suffix(".new").write_text(str(os.getpid()))
        place.with_suffix(".new").replace(place)


def _leave_with_parent(folder: str) -> None:
    """Ends the worker when its parent is gone, which a parent that was killed cannot ask for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
