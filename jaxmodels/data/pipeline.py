"""From random-access sources to numpy batches whose order depends on the seed alone.

A batch is a function of its number: which records it holds, in which order, with which random
numbers. So the state of an iterator is that number, and it means the same for any number of worker
processes, hosts or prefetched batches, and in any version of grain.

    stages = [pipeline.Stage(source, transform, batch_size=8, steps=300)]
    iterator = iter(pipeline.train_batches(stages, seed=0))
    batch = next(iterator)            # {"input_ids": [8, 4096], ...}
    state = iterator.get_state()      # JSON values, for the checkpoint
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jaxmodels.data import bad_records
from jaxmodels.data import batches as batches_lib
from jaxmodels.data.fingerprints import describe_source, describe_transform
from jaxmodels.data.records import Transform


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of training with batches of one shape.

    Attributes:
      source: random access (`__len__`, `__getitem__`) to records, dicts of arrays and numbers. Its
        `fingerprint`, a dict of JSON values, identifies the data where it has one.
      transform: `transform(record, rng) -> example`, a dict of arrays of one shape; None keeps the
        record. The `numpy.random.Generator` depends on seed, stage, epoch and record only.
      batch_size: rows of the global batch, over all processes.
      steps: batches of this stage; None (last stage only) goes on for ever.
    """

    source: Any
    transform: Transform | None
    batch_size: int
    steps: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a size that is not positive."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: at least 1 is needed")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1 is needed, or None for no end")


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """How batches are prepared; nothing here changes what is in them.

    Attributes:
      num_workers: processes that prepare batches; 0: the thread that asks for a batch makes it (the
        trainer asks ahead, in a thread of its own).
      prefetch: batches that each worker keeps ready.
      process_index, process_count: this process among those that train together; None asks jax.
      max_bad_records: distinct records that may fail (each is logged once, and the next one of the
        same epoch takes its place); one more raises. The count is part of the iterator's state.
    """

    num_workers: int = 0
    prefetch: int = 2
    process_index: int | None = None
    process_count: int | None = None
    max_bad_records: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be."""
        for name, least in (("num_workers", 0), ("prefetch", 1), ("max_bad_records", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} is needed")

    def process(self) -> tuple[int, int]:
        """Returns (index, count) of this process.

        Raises:
          ValueError: the index is not below the count.
        """
        index, count = self.process_index, self.process_count
        if index is None or count is None:
            import jax

            index = jax.process_index() if index is None else index
            count = jax.process_count() if count is None else count
        if not 0 <= index < count:
            raise ValueError(
                f"process_index={index} of process_count={count}: 0 to {count - 1} are accepted"
            )
        return index, count


def options_from(data: Any) -> PipelineOptions:
    """Returns the options that a config's group `data` asks for.

    Args:
      data: has `num_workers` and `max_bad_records`, as every preset's `config.data`.
    """
    return PipelineOptions(num_workers=data.num_workers, max_bad_records=data.max_bad_records)


def train_batches(
    stages: Sequence[Stage], *, seed: int, options: PipelineOptions | None = None
) -> Any:
    """Returns this process's rows of the shuffled batches, stage after stage.

    Records come in a new order each epoch; a batch may hold the end of one epoch and the start of
    the next, and no record is dropped. Each stage starts an epoch of its own. Process p of P gets
    rows `[p * b, (p + 1) * b)` of the global batch, b = batch_size / P, so that the global array is
    the same for every P.

    Args:
      stages: one or more; batches change shape between them.
      seed: non-negative; decides the order and all random numbers.
      options: workers, prefetch, processes.

    Returns:
      A `grain.IterDataset` of dicts of numpy arrays `[b, ...]`. Its iterators have `get_state()`
      and `set_state(state)` (JSON values; exact; valid under any `options`); the data set has
      `fingerprint`.

    Raises:
      ValueError: no stage, an empty source, fewer records than one global batch, a batch that the
        processes cannot split, or a first record that the transform or batching refuses.
    """
    options = options or PipelineOptions()
    stages = tuple(stages)
    if not stages:
        raise ValueError("train_batches needs at least one Stage")
    for number, stage in enumerate(stages[:-1]):
        if stage.steps is None:
            raise ValueError(
                f"stage {number} has steps=None, but only the last stage may go on for ever"
            )
    if seed < 0:
        raise ValueError(f"seed={seed}: 0 or more is needed")
    identity = fingerprint(stages, seed, options)
    made = batches_lib.TrainBatches(stages, seed, options.process(), options.max_bad_records)
    return _dataset(made, identity, options)


def eval_batches(
    source: Any,
    transform: Transform | None,
    batch_size: int,
    *,
    seed: int = 0,
    options: PipelineOptions | None = None,
) -> Any:
    """Returns every record once, in order, in batches of one shape.

    The last batch is filled up with copies of the last record. `weight` [b] float32 is 1 for a
    record and 0 for a copy (and for a bad record, where `options` allow some). Every process gets
    the same number of batches, b = batch_size / processes rows each.

    Args:
      source, transform, batch_size: as in `Stage`; the transform may not make a `weight`.
      seed: for random transforms; the same record gets the same numbers in every evaluation.
      options: workers, prefetch, processes.

    Returns:
      A finite `grain.IterDataset` of dicts of numpy arrays `[b, ...]`, with exact state.

    Raises:
      ValueError: as `train_batches`; fewer records than a batch are fine.
    """
    options = options or PipelineOptions()
    stage = Stage(source, transform, batch_size, steps=None)
    identity = fingerprint([stage], seed, options) | {"evaluation": True}
    made = batches_lib.EvalBatches(stage, seed, options.process(), options.max_bad_records)
    return _dataset(made, identity, options)


def fingerprint(
    stages: Sequence[Stage], seed: int, options: PipelineOptions | None = None
) -> dict[str, Any]:
    """Returns what decides the order and content of the batches, as JSON values.

    A saved position means the same examples only while this is equal. Number of processes, workers
    and prefetched batches are left out on purpose, because batches do not depend on them; so are
    the steps of the last stage, so that a finished run can be made longer.

    Args:
      stages: as for `train_batches`.
      seed: as for `train_batches`.
      options: accepted for symmetry with `train_batches`.
    """
    del options
    found: dict[str, Any] = {"format": 1, "seed": int(seed)}
    for number, stage in enumerate(stages):
        values = {
            "source": describe_source(stage.source),
            "transform": describe_transform(stage.transform),
            "batch_size": int(stage.batch_size),
        }
        if number + 1 < len(stages):
            values["steps"] = int(stage.steps)
        found |= {f"stage {number} {name}": value for name, value in values.items()}
    return found


def merged_state(states: Sequence[Any]) -> Any:
    """Returns the state from which every process may continue, given those of all processes.

    Processes read different records, so each has met bad records of its own; all else is equal.

    Args:
      states: of the iterators of all processes after the same batch.

    Raises:
      ValueError: the states differ in more than their bad records.
    """
    first = states[0]
    if all(state == first for state in states):
        return first
    if not all(isinstance(state, dict) and "bad_records" in state for state in states):
        raise ValueError(f"the processes are at different places in the data: {list(states)}")
    rest = [{k: v for k, v in state.items() if k != "bad_records"} for state in states]
    if any(each != rest[0] for each in rest):
        raise ValueError(f"the processes are at different places in the data: {rest}")
    return first | {"bad_records": bad_records.union([s["bad_records"] for s in states])}


def what_is_lost(state: Any) -> str:
    """Returns, for people, what starting the data anew at batch 0 gives up.

    Args:
      state: of an iterator, as a checkpoint holds it (a dict, or its JSON text).
    """
    state = json.loads(state) if isinstance(state, str) else state
    if not isinstance(state, dict) or "next_batch" not in state:
        return "the saved place in the data is given up: examples seen before may be seen again"
    bad = len(state.get("bad_records", "").split())
    more = f", and {bad} bad records are counted anew" if bad else ""
    return (
        f"the saved place in the data (batch {state['next_batch']}) is given up: the new data "
        f"starts at its batch 0, so examples seen before may be seen again{more}"
    )


def _dataset(made: Any, identity: dict[str, Any], options: PipelineOptions) -> Any:
    """Wraps random-access batches for grain; grain itself is loaded only here."""
    from jaxmodels.data import grain_stream

    return grain_stream.BatchStream(
        made,
        identity,
        num_workers=options.num_workers,
        prefetch=options.prefetch,
        max_bad_records=options.max_bad_records,
    )
