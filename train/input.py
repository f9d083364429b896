"""From a host-side data set to global arrays on the mesh, prepared while the step before runs."""

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmodels.core import partitioning
from jaxmodels.core.task import Batch

# Host types that the device has no use for. Token ids of 16 bits become int32 so that arithmetic on
# them has a sign; floats and integers of 64 bits would be cut by jax anyway, here not silently.
_DEVICE_DTYPES = {
    np.dtype(np.int64): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.uint32),
    np.dtype(np.uint16): np.dtype(np.int32),
    np.dtype(np.float64): np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Placed:
    """One batch on the mesh.

    Attributes:
      batch: global arrays, the leading axis split over every device.
      examples: rows of the global batch.
      tokens: true values of `attention_mask`, else values of `input_ids`; 0 with neither. Of the
        global batch, taking the other processes' shares to be like this one's.
      position: JSON text of the iterator's state after this batch; None where it has none.
    """

    batch: Batch
    examples: int
    tokens: int
    position: str | None


def place(batch: dict[str, np.ndarray], mesh: Mesh, position: str | None = None) -> Placed:
    """Puts this process's rows of a batch on the mesh.

    Raises:
      ValueError: a value is not a numeric array, does not fit 32 bits, or has rows that do not
        split evenly over the devices.
    """
    processes = jax.process_count()
    arrays = {name: _device_array(name, value) for name, value in batch.items()}
    rows = {name: len(value) * processes for name, value in arrays.items()}
    if len(set(rows.values())) != 1 or next(iter(rows.values())) % mesh.size:
        raise ValueError(
            f"batch with rows {rows}: every array needs the same number of rows, "
            f"a multiple of the {mesh.size} devices; change batch_size or the mesh."
        )
    sharding = partitioning.batch_sharding(mesh)
    placed = {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in arrays.items()
    }
    return Placed(placed, next(iter(rows.values())), processes * _tokens(arrays), position)


def _device_array(name: str, value: Any) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in "biuf" and value.dtype.name != "bfloat16":
        raise ValueError(f"batch[{name!r}] is of type {value.dtype}: only numbers go to a device.")
    if value.ndim == 0:
        raise ValueError(f"batch[{name!r}] is a scalar: every array needs a leading axis of rows.")
    wanted = _DEVICE_DTYPES.get(value.dtype, value.dtype)
    if wanted.kind in "iu" and value.dtype.itemsize == 8 and value.size:
        limits = np.iinfo(wanted)
        if value.min() < limits.min or value.max() > limits.max:
            raise ValueError(f"batch[{name!r}] holds values that do not fit {wanted}.")
    return value.astype(wanted, copy=False)


def _tokens(arrays: dict[str, np.ndarray]) -> int:
    if "attention_mask" in arrays:
        return int(np.count_nonzero(arrays["attention_mask"]))
    return arrays["input_ids"].size if "input_ids" in arrays else 0


class Prefetcher:
    """Iterates over placed batches; a thread stays `depth` of them ahead.

    Each batch travels with the state that its iterator had right after it, so that a checkpoint
    holds the position of what was consumed, not of what was prefetched.

    Attributes:
      waited: seconds the consumer has spent waiting for a batch.
    """

    def __init__(
        self, batches: Iterable[Any], mesh: Mesh, position: str | None = None, depth: int = 2
    ):
        """Starts the thread.

        Args:
          batches: iterable of this process's numpy batches.
          mesh: where batches go.
          position: state to continue from, as `Placed.position` gave it.
          depth: batches kept ready.

        Raises:
          ValueError: a position is given and the iterator cannot take it.
        """
        self.waited = 0.0
        self._mesh = mesh
        self._iterator = iter(batches)
        if position is not None:
            _set_position(self._iterator, position)
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Placed]:
        return self

    def __next__(self) -> Placed:
        start = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._ready.put(item)  # asked again, it says the same again
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and waits for it, then closes the iterator (and its workers)."""
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.05)
        self._drain()
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get_nowait()

    def _fill(self) -> None:
        try:
            for batch in self._iterator:
                self._put(place(batch, self._mesh, _get_position(self._iterator)))
                if self._stopped.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:  # raised again in the consumer
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def _get_position(iterator: Any) -> str | None:
    """The iterator's state as text: a copy that its further steps cannot change."""
    return json.dumps(iterator.get_state()) if hasattr(iterator, "get_state") else None


def _set_position(iterator: Any, position: str) -> None:
    if not hasattr(iterator, "set_state"):
        raise ValueError("the data set's iterator has no set_state: it cannot continue a run.")
    iterator.set_state(json.loads(position))
