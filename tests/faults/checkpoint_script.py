"""Run by test_checkpoints.py as a process of its own: saves while something is done to it.

python -m tests.faults.checkpoint_script FOLDER kills | limit | small_disk
"""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from etils import epath

from tests.train import checkpoint_cases as cases
from train.checkpoint import Checkpoints, manifest
from train.checkpoint import writer as writer_lib
from train.checkpoint.arrays import ArrayWriter
from train.checkpoint.folder import Folder
from train.errors import CheckpointError

# Where a kill comes, and the step that is to be found afterwards; 1 and 2 were saved before.
POINTS = {
    "marked": 2,
    "arrays_begun": 2,
    "arrays_written": 2,
    "manifest_begun": 2,
    "manifest_written": 3,
    "deletion_begun": 3,
    "deletion_half_done": 3,
    "frozen_written": None,
    "frozen_moved": None,
}


def die(*_: Any, **__: Any) -> None:
    """What the kernel does to a preempted process."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, action: Callable[..., None] = die) -> None:
    """Runs `action` when `owner.name` is called, and then that."""
    real = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, both)


def half_deleted(self: Folder, step: int) -> None:
    """Deletes a little of a step, and dies."""
    self._mark(step).touch()
    (self.path(step) / manifest.NAME).unlink()
    (self.path(step) / "params").rmtree()
    die()


def prepare(point: str) -> None:
    """Sets the trap at `point`, which the next save goes through."""
    if point == "marked":
        before(ArrayWriter, "start")
    elif point == "arrays_begun":
        before(ArrayWriter, "join")
    elif point in ("arrays_written", "frozen_moved"):
        before(manifest, "write")
    elif point == "manifest_begun":
        before(type(epath.Path("/")), "replace")
    elif point == "manifest_written":
        before(Folder, "finish")
    elif point == "deletion_begun":
        before(Folder, "delete")
    elif point == "deletion_half_done":
        Folder.delete = half_deleted
    elif point == "frozen_written":
        before(writer_lib.Writer, "_seal_frozen")


def kill(workdir: pathlib.Path, point: str) -> None:
    """Saves steps 1 and 2, and is killed while it saves 3; or while it saves its first."""
    with Checkpoints(workdir, keep=2) as saved:
        if POINTS[point] is None:
            prepare(point)
            saved.save(1, cases.state(1, frozen=cases.frozen()), {})
        for step in (1, 2, 3):
            if step == 3:
                prepare(point)
            saved.save(step, cases.state(step), {"position": step})
            saved.wait()
    raise AssertionError(f"{point} never came")


def kill_at_all(folder: pathlib.Path) -> None:
    """Forks a process for each point, two at a time, before jax has started any thread."""
    begun: dict[int, str] = {}
    warnings.simplefilter("ignore", RuntimeWarning)  # jax warns of forks whatever they are for
    points = list(POINTS)
    while points or begun:
        while points and len(begun) < 2:
            point = points.pop()
            child = os.fork()
            if child == 0:
                kill(folder / point, point)
            begun[child] = point
        child, status = os.wait()
        point = begun.pop(child)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, point


def polled(saved: Checkpoints, step: int) -> str | None:
    """Saves a step and polls until it is known how that went."""
    saved.save(step, cases.state(step), {})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        error = saved.poll()
        if error or saved.latest_step() == step:
            return error
        time.sleep(0.01)
    raise AssertionError("poll never told")


def tell(saved: Checkpoints, steps: range) -> None:
    """Saves until that is given up, telling what came back."""
    for step in steps:
        try:
            print("poll:", polled(saved, step), flush=True)
        except CheckpointError as error:
            print("error:", error, flush=True)


def limit(workdir: pathlib.Path) -> None:
    """Files may not grow beyond a few bytes for two saves, then for three."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(workdir) as saved:
        tell(saved, range(1, 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
        tell(saved, range(2, 4))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        tell(saved, range(3, 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
        tell(saved, range(5, 8))
        print("steps:", saved.steps(), flush=True)


def small_disk(workdir: pathlib.Path) -> None:
    """The same on a disk that fills up, and then turns read-only. Needs the right to mount."""
    workdir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(workdir)], check=True)
    filler = workdir / "filler"
    with Checkpoints(workdir, keep=1) as saved:
        tell(saved, range(1, 2))
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        tell(saved, range(2, 4))
        filler.unlink()
        tell(saved, range(3, 5))
        saved.wait()  # the deletion of old steps too: no file may be open for writing
        subprocess.run(["mount", "-o", "remount,ro", str(workdir)], check=True)
        tell(saved, range(5, 8))
        print("steps:", saved.steps(), flush=True)


if __name__ == "__main__":
    what = {"kills": kill_at_all, "limit": limit, "small_disk": small_disk}[sys.argv[2]]
    what(pathlib.Path(sys.argv[1]))
