"""`python -m train.main`: trains what a config describes. Flags only: the work is `train.loop`."""

from collections.abc import Sequence

from train import cli

FLAGS = (
    cli.Flag("config", "config file and preset, as FILE.py:PRESET", required=True),
    cli.Flag("workdir", "folder of this run: everything it writes, and where it resumes from"),
    cli.Flag(
        "print_config", "list every field with type, value, default and meaning, then leave", False
    ),
)
USAGE = "python -m train.main --config=FILE.py:PRESET --workdir=DIR [--config.NAME=VALUE ...]"


def main(argv: Sequence[str]) -> None:
    """Runs one training command line."""
    command = cli.parse(argv, FLAGS, USAGE)
    config, fields = cli.read_config(command.flags["config"], command.overrides)
    if command.flags["print_config"]:
        print(cli.describe(config, fields))
        return
    if not command.flags["workdir"]:
        raise cli.UsageError(f"--workdir is missing: {FLAGS[1].meaning}")
    from train import loop  # imports jax: only once the command line is known to be good

    loop.train(config, command.flags["workdir"], fields)


if __name__ == "__main__":
    cli.run(main)
