"""`python -m train.main`: trains what a config describes. Flags only: the work is `train.loop`."""

from collections.abc import Sequence

from train import cli

FLAGS = (
    cli.Flag("config", "config file and preset, as FILE.py:PRESET", required=True),
    cli.Flag("workdir", "folder of this run: everything it writes, and where it resumes from"),
    cli.Flag(
        "print_config", "list every field with type, value, default and meaning, then leave", False
    ),
    cli.Flag(
        "dry_run", "print shapes, sizes and FLOPs of this run, compile nothing, then leave", False
    ),
    cli.Flag("data_reset", "continue on other data than saved, from their beginning", False),
    *cli.DISTRIBUTED,
)
USAGE = "python -m train.main --config=FILE.py:PRESET --workdir=DIR [--config.NAME=VALUE ...]"


def main(argv: Sequence[str]) -> None:
    """Runs one training command line."""
    command = cli.parse(argv, FLAGS, USAGE)
    config, fields = cli.read_config(command.flags["config"], command.overrides)
    if command.flags["print_config"]:
        print(cli.describe(config, fields))
        return
    if command.flags["dry_run"]:
        from train import compile as compile_lib

        print(compile_lib.dry_run(config, fields))
        return
    if not command.flags["workdir"]:
        raise cli.UsageError(f"--workdir is missing: {FLAGS[1].meaning}")
    from train import loop, signals, storage, tasks  # import jax, touch no device
    from train.writers import wandb as wandb_writer

    workdir = storage.folder(command.flags["workdir"])
    tasks.load_task(config)
    wandb_writer.check(config)
    cli.start_processes(command, config)
    trained = loop.train(config, workdir, fields, data_reset=command.flags["data_reset"])
    if trained.stopped_by:
        raise SystemExit(signals.EXIT_STATUS)


if __name__ == "__main__":
    cli.run(main)
