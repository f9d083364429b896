"""Loading a published checkpoint: python -m benchmarks.load [--small]

Question: how long does it take, and how much memory beyond the loaded arrays themselves?

A file of BERT-base's size (random float32, 438 MB, Hugging Face's names) is loaded by
  ours                  weights.read and import_weights: checked, stacked, transposed NumPy arrays
  ours, sharded over N  weights.load_sharded: JAX arrays on N (simulated) devices, each its part
  safetensors + stack   safetensors.numpy.load_file, then the same transposes and stacks by hand
  transformers          BertModel.from_pretrained: PyTorch's layout, nothing to transpose
each time in a fresh process, in turn. Imports are not counted; of the result one value a page is
read. The first turn does not count: the file then lies in the system's cache, so that readers are
measured and not disks. Memory is anonymous memory (no file behind it), watched from outside about
every millisecond: its peak, less what was there before, less the arrays. It is negative where the
arrays are views of the mapped file, not copies.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load_sides, measure, plots
from train.table import aligned

ROOT = Path(__file__).parents[1]
NEEDS = {"safetensors + stack": ("safetensors",), "transformers": ("torch", "transformers")}


@dataclasses.dataclass(frozen=True)
class Run:
    """One load: seconds, bytes of the arrays, and the peak beyond them (None: not told)."""

    seconds: float
    held: int
    beyond: int | None


def available(sides: Sequence[str]) -> dict[str, str | None]:
    """Returns {side: None, or why it cannot run}."""
    found: dict[str, str | None] = {}
    for side in sides:
        absent = [name for name in NEEDS.get(side, ()) if importlib.util.find_spec(name) is None]
        found[side] = f"{', '.join(absent)} not installed" if absent else None
    return found


def load_once(side: str, folder: Path, size: str) -> Run:
    """Runs one side in a process of its own and watches its memory.

    Raises:
      RuntimeError: the side failed; the message holds what it said.
    """
    flags = f"--xla_force_host_platform_device_count={load_sides.devices(side)}"
    command = [sys.executable, "-m", "benchmarks.load_sides", side, str(folder), size]
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        ready = process.stdout.readline().split()
        line, peak = b"", None
        if ready[:1] == [b"ready"]:
            process.stdin.write(b"\n")
            process.stdin.flush()
            peak = _watch(process)
            line = process.stdout.readline()
        process.stdin.close()
        if process.wait() or not line:
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)}: status {process.returncode}\n{said}")
    told = json.loads(line)
    beyond = None if peak is None else peak - int(ready[1]) - told["bytes"]
    return Run(told["seconds"], told["bytes"], beyond)


def _watch(process: subprocess.Popen[bytes], interval: float = 0.001) -> int | None:
    """Returns the highest anonymous memory of a process until it prints a line or ends."""
    peak = None
    while True:
        now = load_sides.anonymous_bytes(process.pid)
        peak = max(filter(None, (peak, now)), default=None)
        if select.select([process.stdout], [], [], interval)[0]:
            return peak


def measure_loads(folder: Path, size: str, sides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Returns {side: {seconds, ratio, beyond_mb, held_mb, all, skipped}}; medians.

    Args:
      folder: holds the checkpoint.
      size: of `load_sides.SIZES`.
      sides: the first is what the others are divided by, turn by turn.
      rounds: counted turns; one more before them.
    """
    reasons = available(sides)
    runs: dict[str, list[Run]] = {side: [] for side in sides if reasons[side] is None}
    for turn in range(rounds + 1):
        for side in runs if turn % 2 == 0 else reversed(runs):
            runs[side].append(load_once(side, folder, size))
    return {side: _summary(side, runs, reasons[side]) for side in sides}


def _summary(side: str, runs: Mapping[str, list[Run]], reason: str | None) -> dict[str, Any]:
    if side not in runs:
        return {"skipped": reason}
    own, base = runs[side][1:], next(iter(runs.values()))[1:]
    beyond = [run.beyond / 1e6 for run in own if run.beyond is not None]
    return {
        "seconds": float(np.median([run.seconds for run in own])),
        "ratio": float(np.median([a.seconds / b.seconds for a, b in zip(own, base, strict=True)])),
        "beyond_mb": float(np.median(beyond)) if beyond else None,
        "held_mb": own[0].held / 1e6,
        "all": [run.seconds for run in own],
        "all_beyond_mb": beyond,
        "skipped": None,
    }


def table(found: Mapping[str, Any]) -> str:
    """Returns the table: a line a side."""
    rows = [("side", "seconds", "ratio", "arrays, MB", "peak beyond, MB")]
    for side, one in found.items():
        if one["skipped"]:
            rows.append((side, f"not run: {one['skipped']}", "", "", ""))
            continue
        beyond = "not told" if one["beyond_mb"] is None else f"{one['beyond_mb']:,.1f}"
        numbers = f"{one['seconds']:.3f}", f"{one['ratio']:.2f}x", f"{one['held_mb']:,.1f}"
        rows.append((side, *numbers, beyond))
    return aligned(rows, right=(1, 2, 3, 4))


def figure(found: Mapping[str, Any]) -> Any:
    """Returns a matplotlib figure: seconds, and peak memory beyond the arrays, a bar a side."""
    made, axes = plots.panels(1, 2)
    sides = {side: one for side, one in found.items() if not one["skipped"]}
    texts = {"seconds": "seconds, median", "beyond_mb": "peak memory beyond the arrays, MB"}
    for axis, (field, text) in zip(axes[0], texts.items(), strict=True):
        values = [one[field] or 0.0 for one in sides.values()]
        colours = [plots.COLOURS[0] if side.startswith("ours") else plots.GREY for side in sides]
        bars = axis.barh(range(len(sides)), values, color=colours, height=0.6)
        form = "{:.2f}" if field == "seconds" else "{:,.0f}"
        axis.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9)
        axis.set_yticks(range(len(sides)), sides if axis is axes[0][0] else [""] * len(sides))
        axis.invert_yaxis()
        low, high = min(0.0, *values), max(*values, 1e-3)
        axis.set_xlim(low - 0.25 * (high - low) * (low < 0), high + 0.2 * (high - low))
        axis.set_xlabel(text, fontsize=9)
    return made


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Measures, prints the table, and writes JSON and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny file: a look, no result")
    parser.add_argument("--rounds", type=int, default=7, help="counted turns")
    parser.add_argument("--sides", default=";".join(load_sides.SIDES), help="which, joined by ;")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder of the results")
    options = parser.parse_args()
    began, size = time.perf_counter(), "small" if options.small else "base"
    with tempfile.TemporaryDirectory(prefix="load") as place:
        bytes_written = load_sides.write_checkpoint(Path(place), size)
        sides = options.sides.split(";")
        found = measure_loads(Path(place), size, sides, options.rounds)
    versions = {name: _version(name) for name in ("safetensors", "torch", "transformers")}
    result = {
        "question": __doc__,
        "environment": measure.environment({k: v for k, v in vars(options).items() if k != "out"}),
        "versions": versions,
        "file_bytes": bytes_written,
        "sides": found,
    }
    name = "load_small" if options.small else "load"
    path = measure.save(name, result, options.out)
    plots.save(figure(found), f"{options.out}/{name}.png")
    print(table(found))
    print(f"\n{path} and the same as .png; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
