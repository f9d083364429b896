"""Orbax, which alone writes and reads the arrays of checkpoints: the one file that knows it."""

import dataclasses
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

Tree = Any
PROGRESS = "progress"
_SECONDS = 900  # longest background write


class ArrayWriter:
    """Writes folders of items in the background, one folder at a time."""

    def __init__(self, label: str = ""):
        """`label` tells this writer's barriers from those of an earlier one that gave up."""
        _quiet()
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=label or None)
        options = ocp.options.AsyncOptions(timeout_secs=_SECONDS)
        handlers = {name: _handler(processes) for name in ("params", "frozen", "training")}
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(
                multiprocessing_options=processes, async_options=options
            ),
            **handlers,
            **{PROGRESS: _ProgressHandler()},
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler, multiprocessing_options=processes, async_options=options
        )

    def start(self, folder: epath.Path, trees: Mapping[str, Tree], progress: str) -> None:
        """Returns once the arrays of `trees` (those not empty) may be donated.

        Args:
          folder: must not exist.
          trees: {item: nested dict of arrays}.
          progress: text that this process keeps beside them.

        Raises:
          Exception: of the storage; more may come from `join`.
        """
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items() if tree}
        args[PROGRESS] = _SaveProgress(progress)
        self._orbax.save(folder, args=ocp.args.Composite(**args))

    def join(self) -> None:
        """Returns when all is written; raises what went wrong."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Releases threads and handlers; raises what went wrong last."""
        self._orbax.close()


def read(folder: epath.Path, tree: Tree) -> Tree:
    """Returns the item in `folder` as `tree` says: shape structs with shardings, numpy arrays."""
    if not tree:
        return {}
    handler = _handler()
    try:
        args = ocp.checkpoint_utils.construct_restore_args(tree)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(item=tree, restore_args=args))
    finally:
        handler.close()


def progress_file(index: int, count: int) -> str:
    """Returns where in a step's folder process `index` of `count` keeps its progress."""
    return f"{PROGRESS}/process_{index}_of_{count}.json"


def _quiet() -> None:
    """Keeps orbax's accounts of errors, pages long, off the screen: we tell them in a line."""
    absl, asyncio = (logging.getLogger(name) for name in ("absl", "asyncio"))
    if any(isinstance(rule, _NotOrbax) for rule in absl.filters):
        return
    for logger in (absl, asyncio):
        logger.addFilter(_NotOrbax())
    sys.unraisablehook = functools.partial(_not_late, sys.unraisablehook)


class _NotOrbax(logging.Filter):
    """Drops what orbax logs, and what asyncio logs of tasks that orbax leaves after an error."""

    def filter(self, record: logging.LogRecord) -> bool:
        where = record.pathname
        if record.name == "asyncio" and record.exc_info:
            where = record.getMessage() + "".join(traceback.format_exception(*record.exc_info))
        return "orbax" not in where


def _not_late(hook: Callable[[Any], None], event: Any) -> None:
    """TensorStore prints a traceback for each write that ends after another one has failed."""
    if event.exc_type is not RuntimeError or str(event.exc_value) != "Event loop is closed":
        hook(event)


def _handler(processes: Any = None) -> ocp.PyTreeCheckpointHandler:
    options = {"multiprocessing_options": processes} if processes else {}
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, **options)


class _ProgressHandler(ocp.AsyncCheckpointHandler):
    """Keeps one JSON file a process: each has its own place in the data."""

    async def async_save(self, directory: epath.Path, args: "_SaveProgress") -> list[Any]:
        name = progress_file(jax.process_index(), jax.process_count()).split("/")[1]

        async def write() -> None:
            (directory / name).write_text(args.text)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="progress")]

    def save(self, directory: epath.Path, args: "_SaveProgress") -> None:
        raise NotImplementedError("progress is written with the arrays, in the background")

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        raise NotImplementedError("progress is read from its files")


@ocp.args.register_with_handler(_ProgressHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveProgress(ocp.args.CheckpointArgs):
    text: str = ""
