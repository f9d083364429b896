"""Worker processes change nothing but the speed, and their death is noticed."""

import multiprocessing
import os
import signal
import time

import jax
import numpy as np
import pytest

from jaxmodels.data.pipeline import PipelineOptions, Stage, eval_batches, train_batches
from jaxmodels.data.records import RecordError
from jaxmodels.data.workers import WorkerError
from tests.data.sources import FailingSource, Numbers, Slow, add_noise, add_process

STAGES = (Stage(Numbers(10), add_noise, 4, 8), Stage(Numbers(7, width=5), add_noise, 2, 9))


def test_batches_and_states_are_the_same_with_any_number_of_workers() -> None:
    jax.devices()  # workers must start safely beside a jax that runs
    alone = iter(train_batches(STAGES, seed=0))
    batches = [next(alone) for _ in range(5)]
    state = alone.get_state()
    batches += list(alone)
    # From one number of workers to another, in the middle of a stage and across its end.
    first = iter(train_batches(STAGES, seed=0, options=PipelineOptions(num_workers=3)))
    second = iter(train_batches(STAGES, seed=0, options=PipelineOptions(num_workers=2)))
    try:
        found = [{k: v.copy() for k, v in next(first).items()} for _ in range(5)]
        assert first.get_state() == state
        second.set_state(first.get_state())
        found += [{k: v.copy() for k, v in batch.items()} for batch in second]
    finally:
        first.close()
        second.close()
    assert len(found) == len(batches) == 17
    for a, b in zip(found, batches, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])


def test_workers_are_other_processes_kept_off_the_accelerator() -> None:
    options = PipelineOptions(num_workers=2)
    iterator = iter(eval_batches(Numbers(16), add_process, 4, options=options))
    batches = [{k: v.copy() for k, v in batch.items()} for batch in iterator]
    iterator.close()
    processes = {int(p) for batch in batches for p in batch["process"]}
    assert len(processes) == 2 and os.getpid() not in processes
    assert all(batch["on_cpu"].all() for batch in batches)


def test_an_error_in_a_worker_names_the_record() -> None:
    source = FailingSource(10, {6: ValueError("label 12 out of range")})
    options = PipelineOptions(num_workers=1)
    iterator = iter(train_batches([Stage(source, None, 2, 5)], seed=0, options=options))
    with pytest.raises(RecordError, match="record 6 of FailingSource.*label 12 out of range"):
        list(iterator)
    iterator.close()


@pytest.mark.filterwarnings("ignore:resource_tracker")
def test_a_killed_worker_is_an_error_in_seconds_and_the_state_is_good() -> None:
    stages = [Stage(Slow(10), None, 4)]
    before = multiprocessing.active_children()  # those of the last test may still be leaving
    iterator = iter(train_batches(stages, seed=0, options=PipelineOptions(num_workers=1)))
    next(iterator)
    started = [child for child in multiprocessing.active_children() if child not in before]
    (worker,) = [child for child in started if "grain" in child.name]
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    named = rf"data worker 0 of 1 \(pid {worker.pid}\): was ended by SIGKILL"
    with pytest.raises(WorkerError, match=named):
        for _ in range(100):
            next(iterator)
    assert time.monotonic() - start < 20
    position = iterator.get_state()["next_batch"]
    resumed = iter(train_batches(stages, seed=0))
    resumed.set_state(iterator.get_state())
    whole = iter(train_batches(stages, seed=0))
    expected = [next(whole) for _ in range(position + 1)][-1]
    np.testing.assert_array_equal(next(resumed)["x"], expected["x"])
    for each in (iterator, resumed, whole):
        each.close()
