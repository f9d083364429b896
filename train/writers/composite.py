"""Where the numbers of a run go: all places at once, none of which can stop the run."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from train import storage
from train.errors import UsageError
from train.writers.console import TRAIN, Console, duration
from train.writers.metrics_file import JsonLines
from train.writers.tensorboard import TensorBoard
from train.writers.wandb import WeightsAndBiases

__all__ = ["TRAIN", "Console", "JsonLines", "TensorBoard", "Writers", "duration", "open_writers"]


class Writers:
    """All of them at once; on every process but the first, none.

    A writer that fails is warned of once and dropped. The console and metrics.jsonl see to their
    own failures, and stay.
    """

    def __init__(self, *writers: Any):
        """Takes objects with write(step, split, values), flush() and close()."""
        self._writers = list(writers)

    def add(self, writer: Any) -> None:
        """Takes one more."""
        self._writers.insert(0, writer)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Hands one record to each."""
        self._each("write", step, split, values)

    def say(self, text: str) -> None:
        """Prints a line on the console, where there is one."""
        for writer in self._writers:
            if isinstance(writer, Console):
                writer.say(text)

    def flush(self) -> None:
        """Makes what was written outlive a crash; called before a checkpoint that builds on it."""
        self._each("flush")

    def close(self) -> None:
        """Closes each; none keeps another from it."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in list(self._writers):
            try:
                getattr(writer, method)(*arguments)
            except Exception as error:
                if isinstance(writer, Console | JsonLines):
                    raise
                self._writers.remove(writer)
                self.say(
                    f"warning: {type(writer).__name__} failed ({storage.describe(error)}); "
                    f"it is written no longer, training goes on"
                )
                if method != "close":
                    with contextlib.suppress(Exception):
                        writer.close()


@contextlib.contextmanager
def open_writers(workdir: epath.PathLike, config: ConfigDict, step: int) -> Iterator[Writers]:
    """Opens the console, metrics.jsonl, TensorBoard and, where asked for, Weights & Biases.

    Every process calls it; only the first one writes.

    Args:
      workdir: of the run.
      config: reads `total_steps` and `wandb`.
      step: continued from; 0 for a new run.

    Raises:
      UsageError: metrics.jsonl cannot be opened, or W&B is asked for and cannot be used.
    """
    if jax.process_index() != 0:
        yield Writers()
        return
    workdir = storage.folder(workdir)
    console = Console(config.total_steps)
    with contextlib.closing(Writers(console)) as writers:
        writers.add(JsonLines(workdir / "metrics.jsonl", step, console.say))
        _add(writers, lambda: TensorBoard(workdir / "tensorboard", step, console.say))
        if config.wandb is not None:
            _add(writers, lambda: WeightsAndBiases(workdir, config, console.say))
        yield writers


def _add(writers: Writers, opened: Any) -> None:
    """Adds an optional writer; one that cannot be opened is done without."""
    try:
        writers.add(opened())
    except UsageError:
        raise
    except Exception as error:
        writers.say(f"warning: a writer is left out ({storage.describe(error)}); training goes on")
