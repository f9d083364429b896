"""Shapes of the training batches, each stage of a curriculum with its own, without their data."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmodels.core import partitioning
from jaxmodels.core.task import Batch
from train.errors import UsageError
from train.input import device_dtype


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps whose batches have one shape.

    Attributes:
      steps: how many; None: to the end of the run, or not known.
      batch: placed `jax.ShapeDtypeStruct`s of the global batch, in the types of the device.
    """

    steps: int | None
    batch: Batch

    @property
    def bytes(self) -> int:
        """Bytes of the global batch."""
        return sum(a.size * np.dtype(a.dtype).itemsize for a in self.batch.values())


def stages(dataset: Any, mesh: Mesh) -> list[Stage]:
    """Returns the stages of a training data set, in their order.

    Args:
      dataset: with `batch_shapes`, [(steps, {name: shape struct of the global batch})]; one
        without it is asked for its first batch, whose shape is taken for all.
      mesh: where batches go.

    Raises:
      UsageError: a batch does not split evenly over the devices, or there is none.
    """
    found = getattr(dataset, "batch_shapes", None)
    if found is None:
        found = [(None, _first(dataset))]
    return [Stage(steps, _placed(arrays, mesh)) for steps, arrays in found]


def _first(dataset: Any) -> dict[str, Any]:
    iterator = iter(dataset)
    try:
        batch = next(iterator)
    except StopIteration:
        raise UsageError("the training data holds no batch") from None
    finally:
        getattr(iterator, "close", lambda: None)()
    processes = jax.process_count()
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {
        name: jax.ShapeDtypeStruct((value.shape[0] * processes, *value.shape[1:]), value.dtype)
        for name, value in arrays.items()
    }


def _placed(arrays: dict[str, Any], mesh: Mesh) -> Batch:
    sharding = partitioning.batch_sharding(mesh)
    rows = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(rows.values())) != 1 or next(iter(rows.values())) % mesh.size:
        raise UsageError(
            f"batch with rows {rows}: every array needs the same number of rows, a multiple of the "
            f"{mesh.size} devices; change batch_size or the mesh"
        )
    return {
        name: jax.ShapeDtypeStruct(array.shape, device_dtype(array.dtype), sharding=sharding)
        for name, array in arrays.items()
    }
