"""The runs of the demo: VCC, its dense twin and the controls, each a real command of `train`."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRESET = "configs/vcc.py:quickstart"
EVALUATION_DOCUMENTS = 256  # held-out documents of the final evaluation, for every side alike


@dataclasses.dataclass(frozen=True)
class Side:
    """One training run of the demo.

    Attributes:
      name: folder of the run.
      title: in tables and plots.
      overrides: what differs from the quickstart preset.
      swaps: other settings to evaluate the trained weights with: {title: overrides}.
    """

    name: str
    title: str
    overrides: dict[str, str]
    swaps: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


NO_BLOCKS = {"model.num_fine_blocks": "0"}
RANDOM = {"model.selector": "random"}
SIDES = (
    Side("vcc", "VCC", {}, {"VCC, then k = 0": NO_BLOCKS, "VCC, then random": RANDOM}),
    Side("dense", "dense twin", {"model.encoder": "dense"}),
    Side("k0", "trained with k = 0", NO_BLOCKS),
    Side("random", "trained with random blocks", RANDOM),
)


def _flags(overrides: dict[str, str]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def run(arguments: list[str]) -> tuple[float, int]:
    """Runs a command in front of the user; returns (seconds, peak resident bytes).

    Raises:
      SystemExit: the command failed; its own message stands above.
    """
    print("$ python -m " + " ".join(arguments), flush=True)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"demo: that command failed with status {process.returncode}.")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return time.perf_counter() - began, usage.ru_maxrss * unit


def train(side: Side, root: Path, extra: dict[str, str]) -> dict[str, Any]:
    """Trains a side in `root/<name>`, or continues or keeps what is there.

    Returns:
      `process`: seconds and peak resident bytes of the command, as measured when it trained.
    """
    workdir = root / side.name
    measured = workdir / "process.json"
    arguments = ["train.main", f"--config={PRESET}", f"--workdir={workdir}"]
    seconds, peak = run([*arguments, *_flags(extra | side.overrides)])
    if not measured.exists():
        measured.write_text(json.dumps({"seconds": seconds, "peak_bytes": peak}))
    return json.loads(measured.read_text())


def evaluate(workdir: Path, overrides: dict[str, str]) -> dict[str, float]:
    """Evaluates the weights of a run on held-out documents, under other settings if asked."""
    documents = {"data.validation_documents": str(EVALUATION_DOCUMENTS)}
    run(["train.evaluate", f"--workdir={workdir}", *_flags(documents | overrides)])
    return json.loads((workdir / "evaluation.json").read_text())["results"]["validation"]


def curves(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the logged lines of a run by split, in step order."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    by_split: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_split.setdefault(line["split"], []).append(line)
    return by_split
