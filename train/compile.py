"""`python -m train.compile`: compiles the training step for hardware that need not be here.

    python -m train.compile --config=configs/vcc.py:roberta_base_4k --topology=v5e:4x4

Prints memory of one device by kind, whether it fits, FLOPs and every collective. Exit status 0:
it fits; 1: it does not; 2: asked for wrongly, nothing was compiled.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from configs.fields import Fields
from train import cli
from train.aot import topology
from train.errors import UsageError

FLAGS = (
    cli.Flag("config", "config file and preset, as FILE.py:PRESET", required=True),
    cli.Flag("topology", "hardware: v5e:4x4, v5p:2x2x2, h200, h200:8, cpu:8, ...", required=True),
    cli.Flag("slices", "TPU slices (or boxes of GPUs) of that topology, over the slow network"),
    cli.Flag("all_shapes", "compile for every shape of batch, not for the largest alone", False),
    cli.Flag("json", "file to write the figures to as well"),
)
USAGE = "python -m train.compile --config=FILE.py:PRESET --topology=NAME:SHAPE [--config.X=V ...]"


def main(argv: Sequence[str]) -> None:
    """Runs one command line; jax is imported only after the environment that it needs is set."""
    command = cli.parse(argv, FLAGS, USAGE)
    slices = cli.whole_number("slices", command.flags["slices"])
    wanted = topology.parse(command.flags["topology"], 1 if slices is None else slices)
    config, _ = cli.read_config(command.flags["config"], command.overrides)
    target = command.flags["json"]
    if target and not pathlib.Path(target).resolve().parent.is_dir():
        raise UsageError(f"--json={target}: its folder does not exist")
    environment = topology.environment(wanted)
    if "jax" in sys.modules and any(os.environ.get(k) != v for k, v in environment.items()):
        again = [sys.executable, "-m", "train.compile", *argv]
        raise SystemExit(subprocess.run(again, env=os.environ | environment).returncode)
    os.environ.update(environment)
    from train.aot import report as compile_report

    compile_report.prepare()
    report = compile_report.compile_for(config, wanted, command.flags["all_shapes"])
    print(report)
    if target:
        pathlib.Path(target).write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if not report.fits:
        raise SystemExit(1)


def dry_run(config: ConfigDict, fields: Fields) -> str:
    """Returns what `train.main --dry_run` prints: shapes, sizes and FLOPs, nothing compiled.

    Args:
      config: of the run.
      fields: of the config; accepted for symmetry with `train.loop.train`.

    Raises:
      UsageError: settings, mesh or data cannot be used.
    """
    del fields
    from train import devices
    from train.aot import report as compile_report

    return compile_report.dry_run(config, devices.start(config))


if __name__ == "__main__":
    cli.run(main)
