"""Orbax, which stores the arrays of converted checkpoints: the one file of `weights` that knows it.

Orbax is imported inside the functions: a bare library can read and import weights without it.
"""

from __future__ import annotations

import functools
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxmodels.weights.importing import LeafSource


def write(folder: pathlib.Path, tree: Any) -> None:
    """Writes a nested dict of `LeafSource` as one orbax checkpoint.

    One leaf at a time is read, encoded and written, so that no more than about two of them are in
    memory.

    Args:
      folder: must not exist.
      tree: the leaves.
    """
    import orbax.checkpoint as ocp

    registry = ocp.type_handlers.create_type_handler_registry((LeafSource, _leaf_handler()))
    with _only_errors():
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))


def read(folder: Any, tree: Any) -> Any:
    """Returns the checkpoint as `tree` says: shape structs, placed where they have shardings.

    Without a sharding, a leaf comes as a NumPy array. `folder` is an `etils.epath.Path`.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    def arguments(leaf: jax.ShapeDtypeStruct) -> Any:
        if getattr(leaf, "sharding", None) is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    try:
        args = ocp.args.PyTreeRestore(item=tree, restore_args=jax.tree.map(arguments, tree))
        with _only_errors():
            return handler.restore(folder if "://" in str(folder) else folder.resolve(), args=args)
    finally:
        handler.close()


@functools.cache
def _leaf_handler() -> Any:
    """The part of orbax that stores one leaf: as for NumPy arrays, but read when its turn comes."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import future

    class LeafHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(
            self, values: Sequence[LeafSource], infos: Any, args: Any = None
        ) -> list[Any]:
            args = args or [ocp.SaveArgs()] * len(values)
            store = super().serialize

            async def one_by_one() -> None:
                for value, info, arg in zip(values, infos, args, strict=True):
                    for pending in await store([value.read()], [info], [arg]):
                        pending.result()

            return [future.CommitFutureAwaitingContractedSignals(one_by_one(), name="leaves")]

    return LeafHandler(deepcopy_host_arrays=False)


class _only_errors:  # noqa: N801 - a context manager, used as a function
    """Keeps orbax's warnings about its own internals off the screen."""

    def __enter__(self) -> None:
        logger = logging.getLogger("absl")
        self.level = logger.level
        logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("absl").setLevel(self.level)
