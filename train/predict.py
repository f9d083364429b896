"""`python -m train.predict`: what a trained model says of each line of a jsonl file."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from train import cli
from train.errors import UsageError

FLAGS = (
    cli.Flag("workdir", "folder of the run to predict with", required=True),
    cli.Flag(
        "input", "jsonl file: one object a line, with the fields the method asks for", required=True
    ),
    cli.Flag(
        "output", "jsonl file to write: one object a line, in the order of the input", required=True
    ),
    cli.Flag("step", "step of the checkpoint; the newest unless given"),
    *cli.DISTRIBUTED,
)
USAGE = "python -m train.predict --workdir=DIR --input=IN.jsonl --output=OUT.jsonl [--step=N]"


def main(argv: Sequence[str]) -> None:
    """Runs one prediction command line."""
    command = cli.parse(argv, FLAGS, USAGE)
    step = cli.whole_number("step", command.flags["step"])
    inputs = read_rows(command.flags["input"])
    output = pathlib.Path(command.flags["output"]).expanduser()
    if not output.parent.is_dir():
        raise UsageError(f"--output={output}: the folder {output.parent} does not exist")
    cli.start_processes(command)
    import jax  # only once the command line is known to be good

    from train.trained import open_run

    run = open_run(command.flags["workdir"], step, command.overrides)
    with jax.set_mesh(run.mesh):
        try:
            outputs = run.task.predict(run.params, inputs)
        except ValueError as error:
            raise UsageError(f"--input={command.flags['input']}: {error}") from error
    if len(outputs) != len(inputs):
        raise RuntimeError(f"predict gave {len(outputs)} outputs for {len(inputs)} inputs")
    if jax.process_index() == 0:
        part = output.with_name(output.name + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in outputs))
        part.replace(output)
        print(f"{len(outputs)} predictions of step {run.step} in {output}")


def read_rows(path: str) -> list[dict[str, Any]]:
    """Returns the objects of a jsonl file; empty lines are passed over.

    Raises:
      UsageError: no such file, or a line that is no JSON object; it is named.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--input={path} cannot be read: {reason}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--input={path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"--input={path}, line {number}: {line.strip()[:40]} is not an object")
        rows.append(row)
    if not rows:
        raise UsageError(f"--input={path}: no line in it")
    return rows


if __name__ == "__main__":
    cli.run(main)
