"""Starts `train.main` in a process of its own and kills it at a chosen moment of a chosen phase."""

import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEADLINE = 300.0  # seconds for anything: a run that takes longer hangs
SECOND = 0.3  # seconds after the first signal within which a second one comes
_STARTED = re.compile(r"(starting|continuing) from step (\d+)")
_STEP = re.compile(r"step (\d+)/(\d+) ")
_EVALUATED = re.compile(r"step (\d+) \|")


@dataclasses.dataclass(frozen=True)
class Run:
    """A command of `train.main` without its workdir, and the workdir."""

    flags: tuple[str, ...]
    workdir: Path


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill to come: the phase aimed at, the share of it that may pass, and the signals."""

    wanted: str
    share: float
    signals: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Life:
    """Seconds that the parts of a run never stopped take: how long a moment may be waited for."""

    seconds: float
    start: float
    compile: float
    steps: float
    save: float
    evaluation: float


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a kill met, and what the process did.

    Attributes:
      phase: start, compile, steps, save, evaluation or end.
      step: the last one that it had shown.
      seconds: from the start to the (first) signal.
      signals: sent.
      status: negative: ended by that signal.
      as_promised: whether status and phase are ones that the commands promise.
    """

    phase: str
    step: int
    seconds: float
    signals: tuple[str, ...]
    status: int
    as_promised: bool


class _Process:
    """A run in a process; its lines are read by a thread, with the moment that each came."""

    def __init__(self, run: Run):
        command = [sys.executable, "-m", "train.main", *run.flags, f"--workdir={run.workdir}"]
        self.run, self.began = run, time.monotonic()
        self.left_over = marks(run.workdir)  # by a start that was killed
        self.lines: list[tuple[float, str]] = []
        self._new: queue.Queue[None] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append((time.monotonic() - self.began, line.rstrip("\n")))
            self._new.put(None)
        self._new.put(None)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def until(self, condition: object, every: float = 0.25) -> bool:
        """Waits until `condition()` holds; False where the process ended before."""
        while True:
            if condition():
                return self.alive
            if not self.alive:
                return False
            self._check_deadline()
            with contextlib.suppress(queue.Empty):
                self._new.get(timeout=every)

    def sleep(self, seconds: float) -> bool:
        """Lets time pass; False where the process ended meanwhile."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(seconds, 0.0))
        return self.alive

    def send(self, name: str) -> None:
        """Sends a signal, if there is still somebody to take it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.Signals[name])

    def wait(self) -> int:
        """Waits for the end; returns the status.

        Raises:
          RuntimeError: it did not end in time; it is killed.
        """
        try:
            status = self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.close()
            raise self._failure("it hangs") from None
        self._reader.join()
        return status

    def close(self) -> None:
        """Leaves no process behind."""
        if self.alive:
            self._process.kill()
            self._process.wait()

    def _check_deadline(self) -> None:
        if self.seconds > DEADLINE:
            self.close()
            raise self._failure("it hangs")

    def _failure(self, what: str) -> RuntimeError:
        said = "\n".join(line for _, line in self.lines[-15:])
        return RuntimeError(f"{self.run.workdir}: {what}; its last lines:\n{said}")


@contextlib.contextmanager
def _started(run: Run) -> Iterator[_Process]:
    process = _Process(run)
    try:
        yield process
    finally:
        process.close()


def finish(run: Run) -> Life:
    """Runs a command to its end and returns how long its parts took.

    Raises:
      RuntimeError: it failed or hangs.
    """
    with _started(run) as process:
        status = process.wait()
        if status:
            raise process._failure(f"status {status}")
        return _life(process.lines)


def _life(lines: list[tuple[float, str]]) -> Life:
    """The parts of a run from the moments of its lines; those that it did not show are short."""
    shown = dict.fromkeys(("start", "compile", "evaluation"), 0.0)
    steps = []
    for (before, earlier), (now, line) in zip([(0.0, ""), *lines], lines, strict=False):
        if _STARTED.match(line):
            shown["start"] = now
        if line.startswith("compiled the step"):
            shown["compile"] = max(shown["compile"], now - before)
        if _EVALUATED.match(line) and _STEP.match(earlier):
            shown["evaluation"] = max(shown["evaluation"], now - before)
        if _STEP.match(line):
            steps.append(now)
    end = lines[-1][0] if lines else 0.0
    length = steps[-1] - steps[0] if steps else 0.0
    least = {name: max(value, 0.05) for name, value in shown.items()}
    return Life(end, least["start"], least["compile"], max(length, 0.1), 0.3, least["evaluation"])


def trial(run: Run, kill: Kill, life: Life) -> Ending | None:
    """Starts the command and kills it; None where it ended before the moment came.

    Raises:
      RuntimeError: it hangs.
    """
    with _started(run) as process:
        if not _await_moment(process, kill, life):
            process.wait()
            return None
        seconds, phase = process.seconds, _phase(process)
        process.send(kill.signals[0])
        if len(kill.signals) > 1:
            process.sleep(kill.share * SECOND)
            process.send(kill.signals[1])
        status = process.wait()
        if kill.signals == ("SIGKILL",):  # nothing moved since: what lies there is what it met
            phase = _phase(process)
        step = last_step(process.lines)
        promised = as_promised(kill.signals, status, phase, process.lines)
        return Ending(phase, step, seconds, kill.signals, status, promised)


def _phase(process: _Process) -> str:
    return phase_of(process.lines, process.run.workdir, process.left_over)


def _await_moment(process: _Process, kill: Kill, life: Life) -> bool:
    """Waits for the moment of a kill; False where the process ended before."""
    lines, every = process.lines, _eval_every(process.run.flags)
    if kill.wanted == "anywhere":
        return process.sleep(kill.share * life.seconds)
    if kill.wanted == "start":
        return process.sleep(kill.share * life.start)

    def started() -> bool:
        return any(_STARTED.match(line) for _, line in list(lines))

    if not process.until(started):
        return False
    if kill.wanted == "compile":
        return process.sleep(kill.share * life.compile)
    if kill.wanted == "steps":
        first = process.until(lambda: any(_STEP.match(line) for _, line in list(lines)))
        return first and process.sleep(kill.share * life.steps)
    if kill.wanted == "save":
        left, workdir = process.left_over, process.run.workdir
        marked = process.until(lambda: bool(marks(workdir) - left), every=0.001)
        return marked and process.sleep(kill.share * life.save)
    evaluating = process.until(lambda: _is_evaluating(lines, every), every=0.001)
    return evaluating and process.sleep(kill.share * life.evaluation)


def phase_of(
    lines: list[tuple[float, str]],
    workdir: Path,
    left_over: frozenset[tuple[str, int]] = frozenset(),
) -> str:
    """Returns what a run was doing, from its lines and what lies in its folder.

    Args:
      lines: that it printed, with their moments.
      workdir: of the run.
      left_over: `marks` before its start.
    """
    texts = [line for _, line in list(lines)]
    if not any(map(_STARTED.match, texts)):
        return "start"
    if marks(workdir) - left_over:
        return "save"
    if not any(map(_STEP.match, texts)):
        compiled = any(text.startswith("compiled the step") for text in texts)
        return "steps" if compiled else "compile"
    if any(text.startswith(("done at", "stopped at")) for text in texts):
        return "end"
    if _is_evaluating(lines, _written(workdir, "eval_every")):
        return "evaluation"
    finished = last_step(lines) == _written(workdir, "total_steps")
    return "end" if finished else "steps"


def _is_evaluating(lines: list[tuple[float, str]], every: int) -> bool:
    """Whether the last step shown is one that is evaluated, and the evaluation is not shown."""
    shown = [line for _, line in list(lines) if _STEP.match(line) or _EVALUATED.match(line)]
    match = _STEP.match(shown[-1]) if shown else None
    if match is None:
        return False
    step, total = int(match[1]), int(match[2])
    return step == total or (every > 0 and step % every == 0)


def last_step(lines: list[tuple[float, str]]) -> int:
    """Returns the last step that a run has shown; that it continued from, before its first."""
    for _, line in reversed(list(lines)):
        if match := _STEP.match(line):
            return int(match[1])
        if match := _STARTED.match(line):
            return int(match[2])
    return 0


def as_promised(
    signals: tuple[str, ...], status: int, phase: str, lines: list[tuple[float, str]]
) -> bool:
    """Whether a process ended as it should after these signals.

    SIGTERM: 143 once training has begun (0 where it was just done), by the signal itself before.
    With SIGKILL after it, whichever came first.
    """
    accepted = {-signal.Signals[name] for name in signals if name == "SIGKILL"}
    if "SIGTERM" in signals:
        accepted |= {0, 128 + signal.SIGTERM}
        if phase in ("start", "compile"):
            accepted.add(-signal.SIGTERM)
    else:
        accepted.add(0)  # it ended between the look and the signal
    said = any("Traceback" in line for _, line in lines)
    return status in accepted and not said


def marks(workdir: Path) -> frozenset[tuple[str, int]]:
    """What stands in the folder while a checkpoint is written or deleted: names, and since when."""
    folder, found = workdir / "checkpoints", set()
    for path in folder.glob("*.unfinished") if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # gone since the folder was read
            found.add((path.name, path.stat().st_mtime_ns))
    return frozenset(found)


def _written(workdir: Path, field: str) -> int:
    try:
        return int(json.loads((workdir / "config.json").read_text())[field])
    except (OSError, ValueError, KeyError):
        return 0


def _eval_every(flags: tuple[str, ...]) -> int:
    for flag in reversed(flags):
        if flag.startswith("--config.eval_every="):
            return int(flag.partition("=")[2])
    return 0
