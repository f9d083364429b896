"""Runs of the toy method, for the tests: in this process, or as a script with simulated devices."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from ml_collections import ConfigDict

from configs import fields
from tests.train import toy_config

ROOT = pathlib.Path(__file__).parents[2]


def config(**overrides: Any) -> ConfigDict:
    """The toy's quickstart; `__` in a keyword stands for the dot of a field's name."""
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    return fields.build(toy_config.FIELDS, toy_config.PRESETS["quickstart"] | values)


def lines(workdir: pathlib.Path, split: str = "train") -> list[dict[str, Any]]:
    """The records of one split in metrics.jsonl."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["split"] == split]


def curve(workdir: pathlib.Path) -> dict[int, tuple[float, ...]]:
    """{step: (loss, accuracy, gradient norm)} of the training steps."""
    return {r["step"]: (r["loss"], r["accuracy"], r["grad_norm"]) for r in lines(workdir)}


def steps_saved(workdir: pathlib.Path) -> list[int]:
    """The steps that have a folder of their own among the checkpoints, whole or not."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def is_whole(workdir: pathlib.Path, step: int) -> bool:
    """Whether a checkpoint has its manifest, which is written last."""
    return (workdir / "checkpoints" / str(step) / "manifest.json").exists()


def python(
    *arguments: str, devices: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in the repository's root with that many simulated CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
