"""A grain data set over batches by number; it needs grain, so `pipeline.py` imports it lazily."""

import os
import signal
import sys
from typing import Any

import grain

from jaxmodels.data import cache_folder
from jaxmodels.data.records import Example


class BatchStream(grain.IterDataset):
    """Batches in order, prepared ahead by a thread or by worker processes.

    Attributes:
      fingerprint: what decides the batches, see `pipeline.fingerprint`.
    """

    def __init__(
        self, batches: Any, fingerprint: dict[str, Any], *, num_workers: int, prefetch: int
    ) -> None:
        """Wraps `batches` (`__len__`, `__getitem__`); nothing is read before the first `next`."""
        super().__init__()
        self.fingerprint = fingerprint
        self._batches = batches
        self._num_workers = num_workers
        self._prefetch = prefetch

    def __len__(self) -> int:
        """Returns the number of batches (a huge one where the last stage has no end)."""
        return len(self._batches)

    def __iter__(self) -> grain.DatasetIterator:
        """Returns a new iterator at batch 0."""
        return _StreamIterator(self)

    def open_at(self, position: int) -> grain.DatasetIterator:
        """Returns grain's own iterator over the batches from `position` on."""
        rest = grain.MapDataset.source(_Rest(self._batches, position))
        # One thread: batches are made in numpy under one interpreter lock.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        dataset = rest.to_iter_dataset(ahead)
        if self._num_workers:
            _mark_flags_parsed()
            dataset = dataset.mp_prefetch(
                grain.multiprocessing.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=self._prefetch
                ),
                worker_init_fn=_start_worker,
            )
        return iter(dataset)


class _StreamIterator(grain.DatasetIterator):
    """Counts batches; its state is the number of the next one, whatever is prefetched by whom."""

    def __init__(self, stream: BatchStream) -> None:
        super().__init__()
        self._stream = stream
        self._identity = cache_folder.digest(stream.fingerprint)[:16]
        self._position = 0
        self._inner: grain.DatasetIterator | None = None

    def __next__(self) -> Example:
        if self._position >= len(self._stream):
            raise StopIteration
        self.start_prefetch()
        try:
            batch = next(self._inner)
        except StopIteration:
            raise RuntimeError(
                f"the data workers stopped at batch {self._position} of {len(self._stream)}"
            ) from None
        except Exception as error:
            if "terminated unexpectedly" in str(error):
                error.add_note(
                    f"a data worker died before batch {self._position} was made (killed, or out of "
                    "memory): the same command continues from the last checkpoint; num_workers=0 "
                    "prepares batches without workers"
                )
            self._drop()
            raise
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the number of the next batch, and a digest of the data set's fingerprint."""
        return {"next_batch": self._position, "fingerprint": self._identity}

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
        self._drop()
        self._position = position

    def start_prefetch(self) -> None:
        """Starts preparing batches before the first is asked for."""
        self._assert_open()
        if self._inner is None:
            self._inner = self._stream.open_at(self._position)
            self._inner.start_prefetch()

    def close(self) -> None:
        """Stops thread and workers; further calls to `next` raise ValueError."""
        self._drop()
        super().close()
        self._ended = True

    def _assert_open(self) -> None:
        if getattr(self, "_ended", False):
            raise ValueError("this iterator is closed: make a new one with iter(dataset)")

    def _drop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


class _Rest:
    """The batches from one number on, as a random-access source."""

    def __init__(self, batches: Any, start: int) -> None:
        self._batches, self._start = batches, start

    def __len__(self) -> int:
        return len(self._batches) - self._start

    def __getitem__(self, index: int) -> Example:
        return self._batches[self._start + int(index)]

    def __repr__(self) -> str:
        return f"{type(self._batches).__name__}[{self._start}:]"


def _mark_flags_parsed() -> None:
    """Lets grain start workers in notebooks and tests, where nobody parsed the absl flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
    """Keeps a worker away from accelerators, and from the Ctrl-C that its parent handles."""
    del index, count
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
