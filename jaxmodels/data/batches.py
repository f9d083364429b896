"""Batches by number: `batches[t]` is batch t, whoever asks and whenever."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.data import records
from jaxmodels.data.bad_records import BadRecord, check_count

# Stands for "no end": grain slices and adds to lengths, which must stay below sys.maxsize.
_ENDLESS = 2**60


class Made(NamedTuple):
    """A batch, and the bad records that were left out of it."""

    batch: records.Example
    bad: tuple[BadRecord, ...]


class TrainBatches:
    """The shuffled global batches of several stages; `[t]` gives one process's rows of batch t.

    Attributes:
      left_out: bad records that the sources themselves left out.
    """

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
        self.left_out = _left_out([stage.source for stage in stages])

    def __len__(self) -> int:
        """Returns the number of batches."""
        return self._ends[-1]

    def __getitem__(self, number: int) -> records.Example:
        """Returns this process's rows of global batch `number`."""
        return self.make(number).batch

    def make(self, number: int) -> Made:
        """Returns this process's rows of global batch `number`, and what was left out of them.

        Raises:
          RecordError: more bad records in this one batch than are allowed in all.
        """
        stage = next(s for s, end in enumerate(self._ends) if number < end)
        reader = self._readers[stage]
        first = (number - (self._ends[stage - 1] if stage else 0)) * reader.batch_size
        batch, _, bad = reader.rows(range(first + reader.start, first + reader.stop))
        return Made(batch, bad)

    def shapes(self) -> list[tuple[int | None, dict[str, tuple[tuple[int, ...], np.dtype]]]]:
        """Returns (steps, {name: (shape of the global batch, dtype)}) of each stage; None: no end.

        Nothing is read: every stage has read its first record already.
        """
        starts = [0, *self._ends]
        return [
            (
                None if end >= _ENDLESS else end - start,
                {
                    name: ((reader.batch_size, *np.shape(value)), np.asarray(value).dtype)
                    for name, value in reader.first.items()
                },
            )
            for reader, start, end in zip(self._readers, starts, self._ends, strict=False)
        ]


class EvalBatches:
    """Every record once, in order, with `weight`; the last batch is filled up with copies.

    Attributes:
      left_out: bad records that the source itself left out.
    """

    def __init__(
        self, stage: Any, seed: int, process: tuple[int, int], max_bad_records: int
    ) -> None:
        """Arguments and errors as of `TrainBatches`, with one stage."""
        self._reader = _Reader(stage, 0, seed, process, max_bad_records, shuffle=False)
        self.left_out = _left_out([stage.source])
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
        return self.make(number).batch

    def make(self, number: int) -> Made:
        """As `TrainBatches.make`, of batch `number` of the evaluation."""
        reader = self._reader
        places = number * reader.batch_size + np.arange(reader.start, reader.stop)
        batch, good, bad = reader.rows(np.minimum(places, reader.records - 1).tolist())
        weight = (good & (places < reader.records)).astype(np.float32)
        return Made(batch | {"weight": weight}, bad)


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
        self._max_bad_records = max_bad_records
        self.first = self._first_good()

    def rows(
        self, places: Sequence[int]
    ) -> tuple[records.Example, np.ndarray, tuple[BadRecord, ...]]:
        """Returns the stacked examples of places, which are no replacements, and the bad records.

        A bad record is replaced by the next good one of its epoch.
        """
        bad: dict[int, BadRecord] = {}
        found = [self._example(*divmod(place, self.records), bad) for place in places]
        batch = {name: np.stack([example[name] for example, _ in found]) for name in self.first}
        return batch, np.asarray([good for _, good in found]), tuple(bad.values())

    def _example(
        self, epoch: int, position: int, bad: dict[int, BadRecord]
    ) -> tuple[records.Example, bool]:
        """Returns (example, True); for a bad record (the next good one of its epoch, False)."""
        for skipped in range(self.records):
            index = self._record_at(epoch, (position + skipped) % self.records)
            try:
                example = self._read(epoch, index)
                where = functools.partial(records.name_record, self._source, index)
                records.check_like(example, self.first, where)
                return example, not skipped
            except records.RecordError as error:
                self._note(bad, index, error)
        raise self._nothing_good()

    def _note(self, bad: dict[int, BadRecord], index: int, error: records.RecordError) -> None:
        """Notes a bad record; raises where these alone are too many, so as not to read on."""
        bad[index] = BadRecord(self._key[1], index, str(error))
        check_count(len(bad), self._max_bad_records, str(error))

    def _record_at(self, epoch: int, position: int) -> int:
        return position if self._order is None else self._order.record(epoch, position)

    def _read(self, epoch: int, index: int) -> records.Example:
        rng: Callable[[], Any] = functools.partial(_generator, (*self._key, epoch, index))
        return records.read_example(self._source, index, self._transform, rng)

    def _first_good(self) -> records.Example:
        """The example of the lowest record that has one: what all others must look like."""
        bad: dict[int, BadRecord] = {}
        for index in range(self.records):
            try:
                return self._read(0, index)
            except records.RecordError as error:
                self._note(bad, index, error)
        raise self._nothing_good()

    def _nothing_good(self) -> records.RecordError:
        name = records.describe_briefly(self._source)
        return records.RecordError(f"{name} has no good record")


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


def _left_out(sources: Sequence[Any]) -> int:
    """Bad records that sources left out when they were opened; a source given twice counts once."""
    return sum(getattr(source, "left_out", 0) for source in {id(s): s for s in sources}.values())


def _generator(key: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
