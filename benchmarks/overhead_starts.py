"""Times `train.main` from its command to its first step, without and with a compilation cache."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a run prints, in this order, and what lies before it.
MARKS = (
    ("training ", "imports"),
    ("starting from", "task, state, data"),
    ("compiled the step", "compile"),
    ("step 1/", "first step"),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds of the parts of one start, by the names in MARKS."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """From the command to the first step's numbers."""
        return sum(self.parts.values())


def measure_start(flags: Sequence[str], workdir: Path, cache: Path) -> Start:
    """Runs one command to its end and returns when its first lines came.

    Args:
      flags: of `train.main`, without workdir and cache.
      workdir: new.
      cache: folder of compiled programs.

    Raises:
      RuntimeError: the run failed, or did not say what a run says.
    """
    command = [sys.executable, "-m", "train.main", *flags, f"--workdir={workdir}"]
    command += [f"--config.compilation_cache={cache}", "--config.total_steps=2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    before, parts, left, said = time.perf_counter(), {}, list(MARKS), []
    for line in process.stdout:
        now = time.perf_counter()
        said.append(line)
        if left and line.startswith(left[0][0]):
            parts[left.pop(0)[1]] = now - before
            before = now
    if process.wait() or left:
        raise RuntimeError(f"{' '.join(command)}: status {process.returncode}\n{''.join(said)}")
    return Start(parts)


def measure_starts(flags: Sequence[str], folder: Path, rounds: int) -> dict[str, list[Start]]:
    """Returns {"first": [...], "second": [...]}: each round has a cache of its own, empty at first.

    One start before them reads data and libraries into the memory of the system.
    """
    measure_start(flags, folder / "warm-up", folder / "warm-up-cache")
    found: dict[str, list[Start]] = {"first": [], "second": []}
    for number in range(rounds):
        for name, starts in found.items():
            workdir, cache = folder / f"{name}{number}", folder / f"cache{number}"
            starts.append(measure_start(flags, workdir, cache))
    return found
