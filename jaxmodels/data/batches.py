"""Batches by number: `batches[t]` is batch t, whoever asks and whenever."""

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmodels.data import records

_LOG = logging.getLogger(__name__)

# Stands for "no end": grain slices and adds to lengths, which must stay below sys.maxsize.
_ENDLESS = 2**60


class TrainBatches:
    """The shuffled global batches of several stages; `[t]` gives one process's rows of batch t."""

    def __init__(
        self, stages: Sequence[Any], seed: int, process: tuple[int, int], max_bad_records: int
    ) -> None:
        """Checks the stages and reads one record of each.

        Args:
          stages: `pipeline.Stage`s.
          seed: seed of order and transforms.
          process: (index, count).
          max_bad_records: see `pipeline.PipelineOptions`.

        Raises:
          ValueError: see `pipeline.train_batches`.
        """
        self._readers = []
        self._ends: list[int] = []
        for number, stage in enumerate(stages):
            if 0 < len(stage.source) < stage.batch_size:
                raise ValueError(
                    f"stage {number}: {records.describe_briefly(stage.source)} has "
                    f"{len(stage.source)} records, fewer than one global batch of "
                    f"{stage.batch_size}: lower batch_size or add records"
                )
            self._readers.append(_Reader(stage, number, seed, process, max_bad_records))
            steps = _ENDLESS if stage.steps is None else stage.steps
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self._ends[-1]

    def __getitem__(self, number: int) -> records.Example:
        """Returns this process's rows of global batch `number`."""
        stage = next(s for s, end in enumerate(self._ends) if number < end)
        reader = self._readers[stage]
        first = (number - (self._ends[stage - 1] if stage else 0)) * reader.batch_size
        return reader.rows(range(first + reader.start, first + reader.stop))[0]


class EvalBatches:
    """Every record once, in order, with `weight`; the last batch is filled up with copies."""

    def __init__(
        self, stage: Any, seed: int, process: tuple[int, int], max_bad_records: int
    ) -> None:
        """Arguments and errors as of `TrainBatches`, with one stage."""
        self._reader = _Reader(stage, 0, seed, process, max_bad_records, shuffle=False)
        if "weight" in self._reader.first:
            raise ValueError(
                "the examples already have a field 'weight', which marks filled-up rows here: "
                "rename it in the transform"
            )

    def __len__(self) -> int:
        """Returns the number of batches, the same for every process."""
        return -(-self._reader.records // self._reader.batch_size)

    def __getitem__(self, number: int) -> records.Example:
        """Returns this process's rows of batch `number`."""
        reader = self._reader
        places = number * reader.batch_size + np.arange(reader.start, reader.stop)
        batch, good = reader.rows(np.minimum(places, reader.records - 1).tolist())
        return batch | {"weight": (good & (places < reader.records)).astype(np.float32)}


class _Reader:
    """Rows of one stage by their place in the endless sequence of epochs."""

    def __init__(
        self,
        stage: Any,
        number: int,
        seed: int,
        process: tuple[int, int],
        max_bad_records: int,
        shuffle: bool = True,
    ) -> None:
        index, count = process
        self.records = len(stage.source)
        self.batch_size = stage.batch_size
        if not self.records:
            raise ValueError(
                f"stage {number}: {records.describe_briefly(stage.source)} has no records: check "
                "the split and its filters"
            )
        if stage.batch_size % count:
            raise ValueError(
                f"stage {number}: batch_size={stage.batch_size} cannot be split over {count} "
                f"processes: choose a multiple of {count}"
            )
        share = stage.batch_size // count
        self.start, self.stop = index * share, (index + 1) * share
        self._source, self._transform = stage.source, stage.transform
        self._order = _Order(self.records, (seed, number)) if shuffle else None
        self._key = (seed, number)
        self._bad = _BadRecords(max_bad_records)
        self.first = self._first_good()

    def rows(self, places: Sequence[int]) -> tuple[records.Example, np.ndarray]:
        """Stacks the examples at the given places; also returns which are not replacements."""
        found = [self._example(*divmod(place, self.records)) for place in places]
        batch = {name: np.stack([example[name] for example, _ in found]) for name in self.first}
        return batch, np.asarray([good for _, good in found])

    def _example(self, epoch: int, position: int) -> tuple[records.Example, bool]:
        """Returns (example, True); for a bad record (the next good one of its epoch, False)."""
        for skipped in range(self.records):
            index = self._record_at(epoch, (position + skipped) % self.records)
            try:
                example = self._read(epoch, index)
                where = f"record {index} of {records.describe_briefly(self._source)}"
                records.check_like(example, self.first, where)
                return example, not skipped
            except records.RecordError as error:
                self._bad.count(index, error)
        raise records.RecordError(f"{records.describe_briefly(self._source)} has no good record")

    def _record_at(self, epoch: int, position: int) -> int:
        return position if self._order is None else self._order.record(epoch, position)

    def _read(self, epoch: int, index: int) -> records.Example:
        rng: Callable[[], Any] = functools.partial(_generator, (*self._key, epoch, index))
        return records.read_example(self._source, index, self._transform, rng)

    def _first_good(self) -> records.Example:
        """The example of the lowest record that has one: what all others must look like."""
        for index in range(self.records):
            try:
                return self._read(0, index)
            except records.RecordError as error:
                self._bad.count(index, error)
        raise records.RecordError(f"{records.describe_briefly(self._source)} has no good record")


class _Order:
    """The order of records in each epoch."""

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self._size, self._key = size, key
        # Prefetched batches may straddle two epochs; a third keeps a thread that lags behind from
        # sorting again.
        self._epoch = functools.lru_cache(maxsize=3)(self._permutation)

    def record(self, epoch: int, position: int) -> int:
        """Returns the record at a position of an epoch."""
        return int(self._epoch(epoch)[position])

    def _permutation(self, epoch: int) -> np.ndarray:
        # Raw bits and a stable sort: unlike numpy's shuffles these are promised never to change.
        bits = np.random.Philox(np.random.SeedSequence((*self._key, epoch))).random_raw(self._size)
        order = np.argsort(bits, kind="stable")
        return order.astype(np.int32) if self._size < 2**31 else order

    def __getstate__(self) -> tuple[int, tuple[int, ...]]:
        return self._size, self._key

    def __setstate__(self, state: tuple[int, tuple[int, ...]]) -> None:
        self.__init__(*state)


class _BadRecords:
    """Counts distinct bad records, logs each once, and stops above the limit."""

    def __init__(self, limit: int, seen: frozenset[int] = frozenset()) -> None:
        self._limit = limit
        self._seen = set(seen)
        self._lock = threading.Lock()

    def count(self, index: int, error: records.RecordError) -> None:
        """Counts a bad record.

        Raises:
          RecordError: there are now more than the limit.
        """
        with self._lock:
            new = index not in self._seen
            self._seen.add(index)
            if len(self._seen) > self._limit:
                if not self._limit:
                    raise error
                raise records.RecordError(
                    f"more than max_bad_records={self._limit} bad records; the last: {error}"
                ) from error
        if new:
            _LOG.warning(
                "bad record %d of at most %d left out: %s", len(self._seen), self._limit, error
            )

    def __getstate__(self) -> tuple[int, frozenset[int]]:
        return self._limit, frozenset(self._seen)

    def __setstate__(self, state: tuple[int, frozenset[int]]) -> None:
        self.__init__(*state)


def _generator(key: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
