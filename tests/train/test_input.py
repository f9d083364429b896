"""Batches on their way to the device: types, order, positions, errors."""

import json
import threading
import time

import grain
import jax
import numpy as np
import pytest

from jaxmodels.core import partitioning
from jaxmodels.data import pipeline
from jaxmodels.data.records import RecordError
from jaxmodels.data.workers import WorkerError
from tests.data.sources import Numbers
from train import input as input_lib
from train.errors import RunError
from train.input import Prefetcher, place


@pytest.fixture(scope="module")
def mesh():
    return partitioning.make_mesh()


def test_types_become_those_of_the_device(mesh):
    kinds = {"uint16": "int32", "int64": "int32", "uint64": "uint32", "float64": "float32"}
    kinds |= {name: name for name in ("uint8", "int32", "bool", "float32", "float16")}
    batch = {name: np.ones((4, 2), name) for name in kinds}
    placed = place(batch, mesh)
    assert {name: value.dtype.name for name, value in placed.batch.items()} == kinds
    assert placed.batch["bool"].sharding == partitioning.batch_sharding(mesh)
    assert placed.examples == 4


def test_values_survive_at_the_ends_of_their_types(mesh):
    ids = np.array([0, 65535], np.uint16)
    wide = np.array([-(2**31), 2**31 - 1], np.int64)
    batch = place({"ids": ids, "wide": wide}, mesh).batch
    assert batch["ids"].tolist() == [0, 65535] and batch["wide"].tolist() == wide.tolist()


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": np.array([2**31])}, "'x'.*do not fit int32"),
        ({"x": np.array(["a"])}, "only numbers"),
        ({"x": np.array([None])}, "only numbers"),
        ({"x": np.float32(1)}, "leading axis"),
        ({"x": np.ones(2), "y": np.ones(3)}, "same number of rows"),
    ],
)
def test_what_cannot_go_to_a_device_is_named(mesh, batch, said):
    with pytest.raises(ValueError, match=said):
        place(batch, mesh)


def test_tokens_are_those_of_the_mask_else_of_the_ids(mesh):
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert place({"input_ids": mask, "attention_mask": mask}, mesh).tokens == 3
    assert place({"input_ids": mask}, mesh).tokens == 6
    assert place({"image": np.ones((2, 3))}, mesh).tokens == 0


def numbers():
    return (
        grain.MapDataset.range(40)
        .shuffle(seed=3)
        .batch(4)
        .to_iter_dataset()
        .map(lambda x: {"x": x})
    )


def test_the_position_is_of_the_batch_consumed_not_prefetched(mesh):
    batches = Prefetcher(numbers(), mesh, depth=3)
    seen = [next(batches) for _ in range(4)]
    batches.close()
    rest = Prefetcher(numbers(), mesh, position=seen[1].position)
    again = [next(rest) for _ in range(2)]
    rest.close()
    for one, other in zip(seen[2:], again, strict=True):
        assert one.batch["x"].tolist() == other.batch["x"].tolist()
        assert json.loads(one.position) == json.loads(other.position)


def test_every_batch_comes_once_and_the_end_stays_the_end(mesh):
    batches = Prefetcher(numbers(), mesh)
    values = np.concatenate([placed.batch["x"] for placed in batches])
    assert sorted(values.tolist()) == list(range(40))
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_an_error_of_the_data_arrives_with_its_own_type_and_text(mesh):
    def broken():
        yield {"x": np.ones(2)}
        raise KeyError("row 7 has no label")

    batches = Prefetcher(broken(), mesh)
    next(batches)
    for _ in range(2):
        with pytest.raises(KeyError, match="row 7"):
            next(batches)
    batches.close()


def test_waiting_is_measured_and_closing_stops_the_thread(mesh):
    def slow():
        while True:
            time.sleep(0.05)
            yield {"x": np.ones(2)}

    batches = Prefetcher(slow(), mesh)
    next(batches), next(batches)
    assert 0.05 < batches.waited < 5
    batches.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_a_data_set_without_a_position_cannot_continue(mesh):
    assert place({"x": np.ones(2)}, mesh).position is None
    with pytest.raises(ValueError, match="set_state"):
        Prefetcher([{"x": np.ones(2)}], mesh, position="{}")


def test_batches_are_global_arrays(mesh):
    placed = place({"x": np.arange(6.0)}, mesh)
    assert isinstance(placed.batch["x"], jax.Array) and placed.batch["x"].committed


class Waiting:
    """An iterator that gives one batch, then waits until its workers are killed."""

    def __init__(self, dead=None):
        self.dead, self.killed, self.closed, self.given = dead, threading.Event(), False, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.given:
            self.killed.wait(60)
            raise WorkerError("data worker 1 of 2 (pid 7) was ended by SIGKILL")
        self.given = True
        return {"x": np.ones(2)}

    def dead_worker(self):
        return self.dead

    def waiting_for(self):
        return "batch 1 from data worker 1 of 2 (pid 7): alive"

    def kill_workers(self):
        self.killed.set()

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("dead", "timeout", "said"),
    [
        (
            None,
            0.2,
            r"no batch for 0 s \(data.timeout_seconds=0.2\): waiting for batch 1 from data w",
        ),
        (
            "data worker 0 of 2 (pid 5) was ended by SIGBUS",
            60,
            r"worker 0 .* SIGBUS; batch 1 of th",
        ),
    ],
)
def test_a_batch_that_does_not_come_is_an_error_that_says_from_whom(
    mesh, monkeypatch, dead, timeout, said
):
    monkeypatch.setattr(input_lib, "_LOOK_EVERY", 0.05)
    source = Waiting(dead)
    batches = Prefetcher(source, mesh, timeout_seconds=timeout)
    next(batches)
    for _ in range(2):
        with pytest.raises(RunError, match=said):
            next(batches)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 4 and source.closed


def test_closing_kills_workers_that_keep_it_waiting(mesh):
    source = Waiting()
    batches = Prefetcher(source, mesh)
    next(batches)
    batches.close(patience=0.2)
    assert source.closed and not batches._thread.is_alive()


def test_closing_leaves_a_thread_behind_that_nothing_wakes(mesh):
    held = threading.Event()

    def stuck():
        yield {"x": np.ones(2)}
        held.wait(60)

    batches = Prefetcher(stuck(), mesh)
    next(batches)
    start = time.monotonic()
    batches.close(patience=0.1)
    assert time.monotonic() - start < 5
    held.set()


def unreadable():
    error = OSError(5, "Input/output error")
    error.add_note("while reading record 6 of Rows(10)")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RecordError("record 6 of Rows(10): too long"), "^record 6 of Rows"),
        (WorkerError("data worker 0 died"), "^data worker 0 died"),
        (
            unreadable(),
            r"cannot be read: OSError: .*Input/output error, while reading record 6 of R",
        ),
    ],
)
def test_what_the_data_say_of_themselves_needs_no_traceback(mesh, error, said):
    def broken():
        yield {"x": np.ones(2)}
        raise error

    batches = Prefetcher(broken(), mesh)
    next(batches)
    with pytest.raises(RunError, match=said) as caught:
        next(batches)
    assert caught.value.__cause__ is error
    batches.close()


def test_values_made_by_a_worker_stay_when_the_worker_is_gone(mesh):
    stages = [pipeline.Stage(Numbers(12, width=4096), None, 4)]
    plain = iter(pipeline.train_batches(stages, seed=0))
    options = pipeline.PipelineOptions(num_workers=1)
    batches = Prefetcher(pipeline.train_batches(stages, seed=0, options=options), mesh)
    placed = [next(batches) for _ in range(6)]
    batches.close()
    for one in placed:
        np.testing.assert_array_equal(one.batch["x"], next(plain)["x"].astype(np.float32))


def test_the_position_of_a_checkpoint_holds_the_bad_records_of_every_process(monkeypatch):
    one = json.dumps({"next_batch": 3, "fingerprint": "f", "bad_records": "0/7 1/2"})
    other = json.dumps({"next_batch": 3, "fingerprint": "f", "bad_records": "0/11 0/7"})
    assert input_lib.shared_position(one) == one and input_lib.shared_position(None) is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(input_lib, "_gathered", lambda text: [text, other])
    expected = {"next_batch": 3, "fingerprint": "f", "bad_records": "0/7 0/11 1/2"}
    assert json.loads(input_lib.shared_position(one)) == expected
    with pytest.raises(ValueError, match="different places in the data"):
        input_lib.shared_position(one.replace("3", "4"))
