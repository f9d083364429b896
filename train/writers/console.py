"""What a run shows while it goes: one line a record, or a bar where somebody watches."""

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

from train.redact import redact

TRAIN = "train"
# Shown by their own short forms, after the metrics.
_RATES = ("examples_per_second", "tokens_per_second", "step_ms", "data_wait", "mfu")
_TIMES = ("seconds", "compile_seconds", "evaluation_seconds")


class Console:
    """Lines in a log; in a terminal a bar that is drawn over for training, lines for the rest.

    A log that cannot be written (a full disk, a terminal that is gone) never stops the run.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        """Writes to `stream` (standard output unless given)."""
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._bar = self._stream.isatty()
        self._drawn = False

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Shows one record."""
        if split != TRAIN:
            return self.say(f"step {step} | {split} | {_values(values)}")
        line = " | ".join(
            filter(None, (_values(values), _speeds(values), self._remaining(step, values)))
        )
        if self._bar:
            self._draw(f"{_bar(step / self._total)} {step}/{self._total} | {line}")
        else:
            self.say(f"step {step}/{self._total} | {line}")

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar; secrets are taken out."""
        self._put(("\r\x1b[K" if self._drawn else "") + redact(text) + "\n")
        self._drawn = False

    def flush(self) -> None:
        """Nothing waits: each line is flushed when it is printed."""

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._drawn:
            self._put("\n")
        self._drawn = False
        spare_the_exit(self._stream)

    def _draw(self, line: str) -> None:
        width = shutil.get_terminal_size().columns
        self._put("\r\x1b[K" + line[: width - 1])
        self._drawn = True

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def _remaining(self, step: int, values: Mapping[str, float]) -> str:
        left = (self._total - step) * values.get("step_ms", 0.0) / 1e3
        return f"eta {duration(left)}" if "step_ms" in values else ""


def say(text: str) -> None:
    """Prints a line where no `Console` is open yet, by its rules."""
    with contextlib.suppress(OSError):
        sys.stdout.write(redact(text) + "\n")
        sys.stdout.flush()


def spare_the_exit(stream: TextIO | None = None) -> None:
    """Lets go of output that cannot be written: Python would exit with status 120 for it."""
    stream = sys.stdout if stream is None else stream
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def duration(seconds: float) -> str:
    """Returns 45s, 3m20s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def _values(values: Mapping[str, float]) -> str:
    shown = [f"{k} {_number(v)}" for k, v in values.items() if k not in (*_RATES, *_TIMES)]
    if "evaluation_seconds" in values:
        shown.append(f"{values['evaluation_seconds']:.1f} s")
    return " | ".join(shown)


def _speeds(values: Mapping[str, float]) -> str:
    forms = {
        "examples_per_second": lambda v: f"{_number(v)} examples/s",
        "tokens_per_second": lambda v: f"{_number(v)} tokens/s",
        "step_ms": lambda v: f"{v:.1f} ms",
        "data_wait": lambda v: f"data {v:.0%}",
        "mfu": lambda v: f"mfu {v:.1%}",
    }
    return " | ".join(form(values[name]) for name, form in forms.items() if name in values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _bar(share: float, width: int = 20) -> str:
    full = min(int(share * width), width)
    return "[" + "#" * full + "." * (width - full) + "]"
