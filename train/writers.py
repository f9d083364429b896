"""Where the numbers of a run go: metrics.jsonl (the truth), TensorBoard, and the console."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from etils import epath

TRAIN = "train"
# Shown on the console by their own short forms, after the metrics.
_RATES = ("examples_per_second", "tokens_per_second", "step_ms", "data_wait", "mfu")
_TIMES = ("seconds", "compile_seconds", "evaluation_seconds")


class JsonLines:
    """`metrics.jsonl`: one object a line, each step of each split once."""

    def __init__(self, path: epath.PathLike, step: int):
        """Opens the file, cut back to the lines up to `step`: later ones will come again."""
        path = epath.Path(path)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) != len(lines):
            part = path.with_name(path.name + ".part")
            part.write_text("".join(line + "\n" for line in kept))
            part.replace(path)
        self._file = path.open("a")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become null: JSON has no word for them."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split} | finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a kill counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Event files for TensorBoard, by tensorboardX."""

    def __init__(self, folder: epath.PathLike, step: int):
        """Opens a new event file; what an earlier one holds after `step` is hidden."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds one point to the curve `split/name` of each value."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        self._writer.close()


class Console:
    """Lines in a log; in a terminal a bar that is drawn over for training, lines for the rest."""

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
        """Prints a line of its own, above the bar."""
        self._stream.write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._stream.flush()
        self._drawn = False

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
        self._drawn = False

    def _draw(self, line: str) -> None:
        import shutil

        width = shutil.get_terminal_size().columns
        self._stream.write("\r\x1b[K" + line[: width - 1])
        self._stream.flush()
        self._drawn = True

    def _remaining(self, step: int, values: Mapping[str, float]) -> str:
        left = (self._total - step) * values.get("step_ms", 0.0) / 1e3
        return f"eta {duration(left)}" if "step_ms" in values else ""


class Writers:
    """All of them at once; on every process but the first, none."""

    def __init__(self, *writers: Any):
        """Takes objects with write(step, split, values) and close()."""
        self._writers = writers

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Hands one record to each."""
        for writer in self._writers:
            writer.write(step, split, values)

    def say(self, text: str) -> None:
        """Prints a line on the console, where there is one."""
        for writer in self._writers:
            if isinstance(writer, Console):
                writer.say(text)

    def close(self) -> None:
        """Closes each."""
        for writer in self._writers:
            writer.close()


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
