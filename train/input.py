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
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxmodels.core import partitioning
from jaxmodels.core.task import Batch
from jaxmodels.data import pipeline
from jaxmodels.data.records import RecordError, reading_note
from jaxmodels.data.workers import WorkerError
from train.errors import RunError

_LOOK_EVERY = 1.0  # seconds between looks at what a late batch waits for

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
    if processes == 1:
        placed = jax.device_put(arrays, sharding)  # all at once: a third of the time
    else:
        placed = {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in arrays.items()
        }
    return Placed(placed, next(iter(rows.values())), processes * _tokens(arrays), position)


def device_dtype(dtype: Any) -> np.dtype:
    """Returns the type that an array of this host type has on a device."""
    return _DEVICE_DTYPES.get(np.dtype(dtype), np.dtype(dtype))


def _device_array(name: str, value: Any) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in "biuf" and value.dtype.name != "bfloat16":
        raise ValueError(f"batch[{name!r}] is of type {value.dtype}: only numbers go to a device.")
    if value.ndim == 0:
        raise ValueError(f"batch[{name!r}] is a scalar: every array needs a leading axis of rows.")
    wanted = device_dtype(value.dtype)
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
        self,
        batches: Iterable[Any],
        mesh: Mesh,
        position: str | None = None,
        depth: int = 2,
        timeout_seconds: float = 0,
    ):
        """Starts the thread.

        Args:
          batches: iterable of this process's numpy batches. Its iterator may have `get_state` and
            `set_state`, and, where it has workers, `dead_worker`, `waiting_for` and `kill_workers`
            as the iterators of `jaxmodels.data.pipeline` have.
          mesh: where batches go.
          position: state to continue from, as `Placed.position` gave it.
          depth: batches kept ready.
          timeout_seconds: without a batch, after which `next` raises; 0: it waits for ever.

        Raises:
          ValueError: a position is given and the iterator cannot take it.
        """
        self.waited = 0.0
        self._mesh = mesh
        self._timeout = timeout_seconds
        self._iterator = iter(batches)
        if position is not None:
            _set_position(self._iterator, position)
        self._made = 0
        self._failure: BaseException | None = None
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Placed]:
        return self

    def __next__(self) -> Placed:
        """Returns the next batch.

        Raises:
          StopIteration: there are no more.
          RunError: a record, a file or a worker of the data failed, or no batch came in time.
          Exception: whatever else making a batch raised.
        """
        if self._failure is not None:
            raise self._failure  # asked again, it says the same again
        start = time.perf_counter()
        try:
            item = self._take(start)
        except RunError as error:
            item = error
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def _take(self, start: float) -> Any:
        """Waits for the thread, looking now and then whether it still can give anything."""
        dead_since = None
        while True:
            try:
                return self._ready.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                now = time.perf_counter()
            dead = getattr(self._iterator, "dead_worker", lambda: None)()
            dead_since = (dead_since or now) if dead else None
            # The iterator notices most deaths itself, and says more.
            if dead and now - dead_since > _LOOK_EVERY * 4:
                raise RunError(f"{dead}; batch {self._made} of this start will not come")
            if self._timeout and now - start >= self._timeout:
                raise RunError(
                    f"no batch for {now - start:.0f} s (data.timeout_seconds={self._timeout:g}): "
                    f"waiting for {self._waiting_for()}. The same command continues from the last "
                    "checkpoint"
                )

    def _waiting_for(self) -> str:
        if hasattr(self._iterator, "waiting_for"):
            return self._iterator.waiting_for()
        return f"batch {self._made} of this start, from {type(self._iterator).__name__}"

    def close(self, patience: float = 5.0) -> None:
        """Stops the thread and closes the iterator (and its workers).

        Args:
          patience: seconds after which workers that keep the thread waiting are killed. A thread
            that waits for something else by then is left behind; it ends with the process.
        """
        self._stopped.set()
        if self._failure is not None or not self._joined(patience):
            getattr(self._iterator, "kill_workers", lambda: None)()
        if self._joined(patience) and hasattr(self._iterator, "close"):
            self._iterator.close()

    def _joined(self, patience: float) -> bool:
        """Waits for the thread to end; says whether it has."""
        deadline = time.monotonic() + patience
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._drain()
            self._thread.join(timeout=0.05)
        self._drain()
        return not self._thread.is_alive()

    def _drain(self) -> None:
        while not self._ready.empty():
            self._ready.get_nowait()

    def _fill(self) -> None:
        try:
            for batch in self._iterator:
                self._put(place(batch, self._mesh, _get_position(self._iterator)))
                self._made += 1
                if self._stopped.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:  # raised again in the consumer
            self._put(_explained(error))

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def _explained(error: BaseException) -> BaseException:
    """The error as a RunError where its text says all: no traceback would help."""
    if isinstance(error, RecordError | WorkerError):
        return _caused(RunError(str(error)), error)
    if isinstance(error, OSError):
        where = reading_note(error)
        told = f"the data cannot be read: {type(error).__name__}: {error}"
        return _caused(RunError(f"{told}, {where}" if where else told), error)
    return error


def _caused(error: RunError, cause: BaseException) -> RunError:
    error.__cause__ = cause
    return error


def shared_position(position: str | None) -> str | None:
    """Returns a position from which every process may continue; all processes call this together.

    Processes of one run read different records, so each has met bad records of its own.

    Args:
      position: this process's `Placed.position`.
    """
    if position is None or jax.process_count() == 1:
        return position
    states = [json.loads(text) for text in _gathered(position)]
    if not all(isinstance(state, dict) and "bad_records" in state for state in states):
        return position  # not of our pipeline: each process has a place of its own
    return json.dumps(pipeline.merged_state(states))


def _gathered(text: str) -> list[str]:
    """The texts of all processes."""
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(raw.size)))
    padded = np.pad(raw, (0, int(sizes.max()) - raw.size))
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _get_position(iterator: Any) -> str | None:
    """The iterator's state as text: a copy that its further steps cannot change."""
    return json.dumps(iterator.get_state()) if hasattr(iterator, "get_state") else None


def _set_position(iterator: Any, position: str) -> None:
    if not hasattr(iterator, "set_state"):
        raise ValueError("the data set's iterator has no set_state: it cannot continue a run.")
    iterator.set_state(json.loads(position))
