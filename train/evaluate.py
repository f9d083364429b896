"""`python -m train.evaluate`: runs the evaluators of a run on a checkpoint of it."""

import json
from collections.abc import Sequence

from train import cli

FLAGS = (
    cli.Flag("workdir", "folder of the run to evaluate", required=True),
    cli.Flag("step", "step of the checkpoint; the newest unless given"),
    *cli.DISTRIBUTED,
)
USAGE = "python -m train.evaluate --workdir=DIR [--step=N] [--config.NAME=VALUE ...]"


def main(argv: Sequence[str]) -> None:
    """Runs one evaluation command line: prints a table, writes `evaluation.json` in the workdir."""
    command = cli.parse(argv, FLAGS, USAGE)
    step = cli.whole_number("step", command.flags["step"])
    cli.start_processes(command)
    import jax  # only once the command line is known to be good
    from etils import epath

    from train import devices, distributed, table
    from train.evaluation import Evaluation
    from train.trained import open_run

    workdir = epath.Path(command.flags["workdir"]).expanduser()
    distributed.same_everywhere("command", {"step": step, **command.overrides})
    run = open_run(workdir, step, command.overrides)
    described = devices.describe(run.mesh)
    first = jax.process_index() == 0
    if first:
        print(f"evaluating {run.config.method} at step {run.step}: {described}", flush=True)
    with jax.set_mesh(run.mesh):
        results = Evaluation(run.task, run.mesh).run(run.params)
    if not first:
        return
    rows = [("evaluator", "metric", "value")]
    rows += [
        (n, metric, f"{v:.6g}") for n, values in results.items() for metric, v in values.items()
    ]
    print(table.aligned(rows, right=(2,)))
    record = {"step": run.step, "overrides": dict(command.overrides), "results": results}
    (workdir / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
