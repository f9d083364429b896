"""A grain data set over batches by number; it needs grain, so `pipeline.py` imports it lazily."""

import atexit
import weakref
from typing import Any

import grain

from jaxmodels.data import bad_records, cache_folder, records
from jaxmodels.data.batches import Made
from jaxmodels.data.workers import WorkerError, Workers, portable


class BatchStream(grain.IterDataset):
    """Batches in order, made when asked for, or ahead of that by worker processes.

    Attributes:
      fingerprint: what decides the batches, see `pipeline.fingerprint`.
    """

    def __init__(
        self,
        batches: Any,
        fingerprint: dict[str, Any],
        *,
        num_workers: int,
        prefetch: int,
        max_bad_records: int = 0,
    ) -> None:
        """Wraps `batches` (`__len__`, `make`); nothing is read before the first `next`.

        Args:
          batches: see `batches.TrainBatches`.
          fingerprint: what decides the batches.
          num_workers: processes that make batches; 0: the thread that calls `next`.
          prefetch: batches that each worker keeps ready.
          max_bad_records: distinct bad records that an iterator leaves out before it raises.
        """
        super().__init__()
        self.fingerprint = fingerprint
        self._batches = batches
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._max_bad_records = max_bad_records
        self._logged: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        """Returns the number of batches (a huge one where the last stage has no end)."""
        return len(self._batches)

    def __iter__(self) -> grain.DatasetIterator:
        """Returns a new iterator at batch 0."""
        return _StreamIterator(self, self._num_workers)

    @property
    def batch_shapes(self) -> list[tuple[int | None, dict[str, Any]]]:
        """(steps, {name: `jax.ShapeDtypeStruct` of the global batch}) of each training stage."""
        import jax

        return [
            (steps, {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()})
            for steps, arrays in self._batches.shapes()
        ]

    def make(self, number: int) -> Made:
        """Returns batch `number`, in this process."""
        return self._batches.make(number)

    def new_tally(self) -> bad_records.Tally:
        """Returns an empty count of bad records."""
        return bad_records.Tally(self._max_bad_records, self._batches.left_out, self._logged)

    def open_at(self, position: int, workers: Workers) -> grain.DatasetIterator:
        """Returns grain's own iterator over `Made` from `position` on, by worker processes."""
        rest = grain.MapDataset.source(_Rest(self._batches, position))
        # One thread: batches are made in numpy under one interpreter lock.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        _mark_flags_parsed()
        dataset = rest.to_iter_dataset(ahead).mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=workers.count, per_worker_buffer_size=self._prefetch
            ),
            worker_init_fn=workers.initialize,
        )
        return iter(dataset)


class _StreamIterator(grain.DatasetIterator):
    """Counts batches; its state is the number of the next one, whatever is prefetched by whom.

    `dead_worker`, `waiting_for` and `kill_workers` may be called from another thread.
    """

    def __init__(self, stream: BatchStream, num_workers: int) -> None:
        super().__init__()
        self._stream = stream
        self._num_workers = num_workers
        self._identity = cache_folder.digest(stream.fingerprint)[:16]
        self._position = 0
        self._tally = stream.new_tally()
        self._inner: grain.DatasetIterator | None = None
        self._workers: Workers | None = None
        self._opened_at = 0

    def __next__(self) -> records.Example:
        if self._position >= len(self._stream):
            raise StopIteration
        self.start_prefetch()
        if self._inner is None:
            made = self._stream.make(self._position)
        else:
            made = self._from_workers(self._inner)
            self._workers.notice()  # while they live
        self._tally.add(made.bad)
        self._position += 1
        return made.batch

    def _from_workers(self, inner: grain.DatasetIterator) -> Made:
        try:
            return next(inner)
        except StopIteration:
            raise WorkerError(
                f"the data workers stopped at batch {self._position} of {len(self._stream)}"
            ) from None
        except Exception as error:
            said = self._diagnosis(error)
            self._drop()
            if said is None:
                raise
            raise WorkerError(said) from error

    def _diagnosis(self, error: Exception) -> str | None:
        """What happened to a worker, in words; None where the error is that of a record."""
        lost = isinstance(error, OSError) and not records.reading_note(error)  # shared memory
        if not lost and "terminated unexpectedly" not in str(error):
            return None
        dead = self._workers.dead(str(error)) if self._workers else None
        return (
            f"{dead or error}; batch {self._position} cannot be made. The same command continues "
            "from the last checkpoint; data.num_workers=0 prepares batches without workers"
        )

    def dead_worker(self) -> str | None:
        """Returns the name of a worker that died and how; None while all live."""
        workers = self._workers
        return None if workers is None else workers.dead()

    def waiting_for(self) -> str:
        """Returns what `next` would wait for: the batch, and the worker that makes it."""
        workers, position = self._workers, self._position
        if workers is None:
            return f"batch {position} of {self._stream.fingerprint.get('stage 0 source')}"
        turn = (position - self._opened_at) % workers.count
        return f"batch {position} from {workers.describe(turn)}"

    def kill_workers(self) -> None:
        """Ends the workers at once: a `next` that waits for one of them raises within seconds."""
        workers = self._workers
        if workers is not None:
            workers.kill()

    def get_state(self) -> dict[str, Any]:
        """Returns the next batch's number, the bad records so far, and the data's digest."""
        return {
            "next_batch": self._position,
            "fingerprint": self._identity,
            "bad_records": self._tally.state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises:
          ValueError: the state is of other data, or not a state of this pipeline.
        """
        position = state.get("next_batch") if isinstance(state, dict) else None
        if not isinstance(position, int) or not 0 <= position:
            raise ValueError(
                f"{state!r} is no state of this pipeline: {{'next_batch': ...}} is needed"
            )
        if state.get("fingerprint") != self._identity:
            raise ValueError(
                f"the saved data position (batch {position}, fingerprint "
                f"{state.get('fingerprint')}) belongs to another data set, seed, batch size or "
                f"transform than this run's (fingerprint {self._identity})"
            )
        if position > len(self._stream):
            raise ValueError(
                f"the saved data position is batch {position}, but there are only "
                f"{len(self._stream)} batches: raise the steps of the last stage"
            )
        self._tally.restore(state.get("bad_records", ""))
        self._drop()
        self._position = position

    def start_prefetch(self) -> None:
        """Starts preparing batches before the first is asked for, where there are workers."""
        self._assert_open()
        if self._inner is None and self._num_workers:
            _OPEN.add(self)
            self._workers, self._opened_at = Workers(self._num_workers), self._position
            self._inner = self._stream.open_at(self._position, self._workers)
            self._inner.start_prefetch()

    def close(self) -> None:
        """Stops the workers; further calls to `next` raise ValueError."""
        self._drop()
        super().close()
        self._ended = True

    def _assert_open(self) -> None:
        if getattr(self, "_ended", False):
            raise ValueError("this iterator is closed: make a new one with iter(dataset)")

    def _drop(self) -> None:
        inner, workers = self._inner, self._workers
        self._inner = self._workers = None
        if inner is not None and workers is not None:
            workers.stop(inner.close)


# An iterator that nobody closed would keep the interpreter from leaving: it waits for workers, and
# these do not mind being asked to go (see `workers.py`).
_OPEN: weakref.WeakSet[_StreamIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_OPEN):
        iterator.kill_workers()
        iterator.close()


class _Rest:
    """The batches from one number on, as a random-access source, in a worker."""

    def __init__(self, batches: Any, start: int) -> None:
        self._batches, self._start = batches, start

    def __len__(self) -> int:
        return len(self._batches) - self._start

    def __getitem__(self, index: int) -> Made:
        try:
            return self._batches.make(self._start + int(index))
        except Exception as error:
            # One that cannot be sent would be lost on its way, and the parent would wait for ever.
            sent = portable(error)
            if sent is error:
                raise
            raise sent from None

    def __repr__(self) -> str:
        return f"{type(self._batches).__name__}[{self._start}:]"


def _mark_flags_parsed() -> None:
    """Lets grain start workers in notebooks and tests, where nobody parsed the absl flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
