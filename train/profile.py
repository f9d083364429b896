"""Traces a few steps with jax.profiler, when asked to, without ever stopping the run."""

import tempfile
from collections.abc import Callable

import jax
from etils import epath

_SKIPPED = 3  # first steps of this start, slower than the rest: caches, allocations


class Profile:
    """A trace of `steps` steps in `workdir/profile`, from the fourth step of this start on.

    Storage that fails costs the trace, with one line about it, and nothing else.
    """

    def __init__(self, workdir: epath.Path, steps: int, say: Callable[[str], None]):
        """Takes the run's folder (it may be remote), the steps to trace (0: none), and a voice."""
        self._target = workdir / "profile"
        self._steps = steps
        self._say = say
        self._seen = 0
        self._local: str | None = None  # of the trace that runs

    def step(self, finish: Callable[[], None]) -> None:
        """Called before each step; `finish` waits for those started: traces hold whole steps."""
        if not self._steps:
            return
        if self._seen == _SKIPPED:
            self._guarded(self._start, finish)
        elif self._seen == _SKIPPED + self._steps:
            self._guarded(self._stop, finish)
        self._seen += 1

    def close(self) -> None:
        """Ends a trace that still runs: the run was shorter."""
        if self._local is not None:
            self._guarded(self._stop, lambda: None)

    def _guarded(self, action: Callable[[], None], finish: Callable[[], None]) -> None:
        finish()
        try:
            with jax.transfer_guard("allow"):
                action()
        except (OSError, RuntimeError, ValueError) as error:
            self._steps, self._local = 0, None
            self._say(f"no profile: {' '.join(str(error).split())}; training goes on")

    def _start(self) -> None:
        remote = "://" in str(self._target)
        self._local = tempfile.mkdtemp(prefix="profile") if remote else str(self._target)
        jax.profiler.start_trace(self._local)

    def _stop(self) -> None:
        local, self._local = epath.Path(self._local), None
        jax.profiler.stop_trace()
        for path in local.glob("**/*") if local != self._target else ():
            if path.is_file():
                copy = self._target / path.relative_to(local)
                copy.parent.mkdir(parents=True, exist_ok=True)
                path.copy(copy, overwrite=True)
        self._say(
            f"profile of {self._seen - _SKIPPED} steps in {self._target}: open it with "
            f"`pip install xprof`, `xprof --logdir={self._target}`, or in ui.perfetto.dev"
        )
