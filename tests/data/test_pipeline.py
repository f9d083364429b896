"""Batches depend on the seed alone: order, epochs, processes, state, padding, bad records."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from jaxmodels.data import pipeline
from jaxmodels.data.pipeline import PipelineOptions, Stage, eval_batches, train_batches
from jaxmodels.data.records import RecordError
from tests.data.sources import FailingSource, Numbers, add_noise

TWO_STAGES = (Stage(Numbers(10), add_noise, 4, 8), Stage(Numbers(7, width=5), add_noise, 2, 9))


def options(**settings: int) -> PipelineOptions:
    return PipelineOptions(**({"process_index": 0, "process_count": 1} | settings))


def records_of(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return np.concatenate([batch["record"] for batch in batches]).tolist()


def assert_same(first: list[Any], second: list[Any]) -> None:
    """Bit-equal batches, and equally many."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


def test_every_epoch_holds_every_record_once_in_a_new_order() -> None:
    batches = list(train_batches([Stage(Numbers(10), None, 4, 15)], seed=0))
    epochs = np.reshape(records_of(batches), (6, 10))
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_the_order_is_the_one_that_checkpoints_were_saved_with() -> None:
    # A change here would give resumed runs other examples: raise `format` in the fingerprint.
    batches = list(train_batches([Stage(Numbers(10), None, 5, 2)], seed=0))
    assert records_of(batches) == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


def test_seeds_and_stages_have_orders_of_their_own() -> None:
    stages = [Stage(Numbers(20), None, 20, 1)] * 2
    first, again, other = (list(train_batches(stages, seed=seed)) for seed in (0, 0, 1))
    assert_same(first, again)
    orders = {tuple(records_of([batch])) for batch in (*first, *other)}
    assert len(orders) == 4


def test_random_transforms_depend_on_seed_epoch_and_record_only() -> None:
    def noise(seed: int, size: int) -> dict[tuple[int, int], float]:
        batches = list(train_batches([Stage(Numbers(12), add_noise, size, 24 // size)], seed=seed))
        rows = [row for batch in batches for row in zip(batch["record"], batch["noise"])]  # noqa: B905
        return {(place // 12, int(record)): float(value) for place, (record, value) in
                enumerate(rows)}  # fmt: skip

    assert noise(0, 4) == noise(0, 12) and len(set(noise(0, 4).values())) == 24
    assert not set(noise(0, 4).values()) & set(noise(1, 4).values())


def test_stages_follow_each_other_and_change_shape() -> None:
    dataset = train_batches(TWO_STAGES, seed=0)
    batches = list(dataset)
    assert len(batches) == len(dataset) == 17
    shapes = [batch["x"].shape for batch in batches]
    assert shapes == [(4, 3)] * 8 + [(2, 5)] * 9


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    stages = [Stage(Numbers(10), add_noise, 4, 6), Stage(Numbers(9), add_noise, 8, 3)]
    alone = list(train_batches(stages, seed=3, options=options()))
    shares = [
        list(train_batches(stages, seed=3, options=options(process_index=p,
                                                           process_count=processes)))
        for p in range(processes)
    ]  # fmt: skip
    joined = [
        {name: np.concatenate([share[name] for share in step]) for name in step[0]}
        for step in zip(*shares, strict=True)
    ]
    assert_same(alone, joined)


@pytest.mark.parametrize("stop", [0, 3, 8, 11, 17])
def test_a_state_gives_the_rest_bit_for_bit(stop: int) -> None:
    iterator = iter(train_batches(TWO_STAGES, seed=5))
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    fresh = iter(train_batches(TWO_STAGES, seed=5, options=PipelineOptions(prefetch=7)))
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(rest, list(fresh))
    assert len(rest) == 17 - stop


def test_a_state_can_be_set_back_in_the_middle() -> None:
    iterator = iter(train_batches(TWO_STAGES, seed=5))
    next(iterator)
    state = iterator.get_state()
    first = [next(iterator) for _ in range(10)]
    iterator.set_state(state)
    assert_same(first, [next(iterator) for _ in range(10)])


def test_a_state_fits_any_number_of_processes() -> None:
    stages = [Stage(Numbers(10), add_noise, 4, 6)]
    alone = iter(train_batches(stages, seed=3, options=options()))
    next(alone)
    half = iter(train_batches(stages, seed=3, options=options(process_index=1, process_count=2)))
    half.set_state(alone.get_state())
    for name, rows in next(alone).items():
        np.testing.assert_array_equal(rows[2:], next_of(half, 1)[name])


def next_of(iterator: Any, position: int) -> dict[str, np.ndarray]:
    """The batch after `position`, without moving on."""
    iterator.set_state(iterator.get_state() | {"next_batch": position})
    return next(iterator)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 6},
        {"batch_size": 5},
        {"source": Numbers(11)},
        {"transform": None},
        {"transform": functools.partial(add_noise, scale=2.0)},
    ],
)
def test_a_state_of_another_pipeline_is_refused(changed: dict[str, Any]) -> None:
    base = Stage(Numbers(10), functools.partial(add_noise, scale=1.0), 4)
    state = iter(train_batches([base], seed=5)).get_state()
    changed = dict(changed)
    seed = changed.pop("seed", 5)
    iterator = iter(train_batches([dataclasses.replace(base, **changed)], seed=seed))
    with pytest.raises(ValueError, match="saved data position .* belongs to another"):
        iterator.set_state(state)


@pytest.mark.parametrize("state", [{}, {"next_batch": -1}, {"next_batch": "1"}, [3], None])
def test_what_is_no_state_is_refused(state: Any) -> None:
    iterator = iter(train_batches(TWO_STAGES, seed=5))
    with pytest.raises(ValueError, match="is no state of this pipeline"):
        iterator.set_state(state)


def test_a_run_may_become_longer_but_not_shorter_than_its_state() -> None:
    def dataset(steps: int | None) -> Any:
        return train_batches([Stage(Numbers(10), None, 4, steps)], seed=0)

    iterator = iter(dataset(6))
    list(iterator)
    for steps in (9, None):
        longer = iter(dataset(steps))
        longer.set_state(iterator.get_state())
        next(longer)
    with pytest.raises(ValueError, match="batch 6, but there are only 5 batches"):
        iter(dataset(5)).set_state(iterator.get_state())


def test_a_closed_iterator_says_so() -> None:
    iterator = iter(train_batches(TWO_STAGES, seed=0))
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10, 16])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_pads_the_last_batch_with_weight_0(size: int, processes: int) -> None:
    if size % processes:
        return
    shares = [
        list(eval_batches(Numbers(10), add_noise, size,
                          options=options(process_index=p, process_count=processes)))
        for p in range(processes)
    ]  # fmt: skip
    assert {len(share) for share in shares} == {-(-10 // size)}
    rows = [batch for step in zip(*shares, strict=True) for batch in step]
    assert all(batch["x"].shape == (size // processes, 3) for batch in rows)
    weight = np.concatenate([batch["weight"] for batch in rows])
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, [1.0] * 10 + [0.0] * (len(weight) - 10))
    assert records_of(rows)[:10] == list(range(10))


def test_evaluation_sees_the_same_random_numbers_each_time() -> None:
    first = list(eval_batches(Numbers(5), add_noise, 2))
    assert_same(first, list(eval_batches(Numbers(5), add_noise, 2)))
    other = np.concatenate([batch["noise"] for batch in eval_batches(Numbers(5), add_noise, 4)])
    np.testing.assert_array_equal(np.concatenate([b["noise"] for b in first])[:5], other[:5])


def test_a_field_named_weight_is_refused_in_evaluation() -> None:
    with pytest.raises(ValueError, match="already have a field 'weight'"):
        eval_batches(Numbers(5), lambda record, rng: {"weight": 1.0}, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train_batches([], seed=0), "at least one Stage"),
        (lambda: train_batches([Stage(Numbers(0), None, 4)], seed=0), "Numbers.* has no records"),
        (lambda: eval_batches(Numbers(0), None, 4), "Numbers.* has no records"),
        (lambda: train_batches([Stage(Numbers(3), None, 4)], seed=0),
         "has 3 records, fewer than one global batch of 4"),
        (lambda: train_batches([Stage(Numbers(9), None, 4)], seed=0,
                               options=options(process_count=3)),
         "batch_size=4 cannot be split over 3 processes"),
        (lambda: train_batches([Stage(Numbers(9), None, 4)] * 2, seed=0),
         "stage 0 has steps=None"),
        (lambda: train_batches([Stage(Numbers(9), None, 4)], seed=-1), "seed=-1"),
        (lambda: Stage(Numbers(9), None, 0), "batch_size=0"),
        (lambda: Stage(Numbers(9), None, 1, 0), "steps=0"),
        (lambda: PipelineOptions(num_workers=-1), "num_workers=-1"),
        (lambda: options(process_index=1).process(), "process_index=1 of process_count=1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_first_batch(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"x": np.zeros(3)}, "field 'record' is missing"),
        (
            {"record": 0, "x": np.zeros(4)},
            r"field 'x' is float64\[4\], in the other .*float64\[3\]",
        ),
        ({"record": 0.5, "x": np.zeros(3)}, r"field 'record' is float64\[\].*int64\[\]"),
        ({"record": 0, "x": np.zeros(3), "y": 1}, "field 'y' is not in the other records"),
        ({"record": 0, "x": "text"}, "field 'x' is of type <U4"),
        ([1, 2], "a dict of arrays is needed, got list"),
        (KeyError("label"), "KeyError: 'label'"),
    ],
)
def test_a_bad_record_is_named_with_its_reason(bad: Any, message: str) -> None:
    source = FailingSource(10, {6: bad})
    with pytest.raises(RecordError, match=f"record 6 of FailingSource.*{message}"):
        list(train_batches([Stage(source, None, 2, 5)], seed=0))


def test_a_lost_disk_is_no_bad_record() -> None:
    source = FailingSource(10, {6: OSError("disk gone")})
    with pytest.raises(OSError, match="disk gone") as caught:
        list(train_batches([Stage(source, None, 2, 5)], seed=0, options=options(max_bad_records=9)))
    assert any("record 6 of FailingSource" in note for note in caught.value.__notes__)


def test_allowed_bad_records_are_replaced_the_same_way_after_a_resume() -> None:
    stage = Stage(FailingSource(10, {0: ValueError("a"), 6: ValueError("b")}), None, 4, 10)
    iterator = iter(train_batches([stage], seed=0, options=options(max_bad_records=2)))
    batches = list(iterator)
    assert set(records_of(batches)) == set(range(10)) - {0, 6}
    iterator = iter(train_batches([stage], seed=0, options=options(max_bad_records=2)))
    iterator.set_state(iterator.get_state() | {"next_batch": 4})
    assert_same(batches[4:], list(iterator))
    with pytest.raises(RecordError, match="more than max_bad_records=1 bad records.*record 6"):
        list(train_batches([stage], seed=0, options=options(max_bad_records=1)))


def test_an_allowed_bad_record_counts_nothing_in_an_evaluation() -> None:
    source = FailingSource(10, {6: ValueError("b")})
    batches = list(eval_batches(source, None, 4, options=options(max_bad_records=1)))
    weight = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(weight == 0), [6, 10, 11])


def test_fingerprints_know_data_order_and_transform_but_not_workers() -> None:
    stage = Stage(Numbers(10), functools.partial(add_noise, scale=2.0), 4, 8)
    found = pipeline.fingerprint([stage], 1)
    assert found == json.loads(json.dumps(found))
    assert found["seed"] == 1 and found["stage 0 batch_size"] == 4
    dataset = train_batches([stage], seed=1, options=options(num_workers=0, prefetch=5))
    assert dataset.fingerprint == found
    assert pipeline.fingerprint([dataclasses.replace(stage, steps=9)], 1) == found
    two = [stage, stage]
    longer = [dataclasses.replace(stage, steps=9), stage]
    assert pipeline.fingerprint(two, 1) != pipeline.fingerprint(longer, 1)
    changed = dataclasses.replace(stage, source=Numbers(10, width=4))
    assert pipeline.fingerprint([changed], 1) != found


def test_a_source_may_bring_its_own_fingerprint() -> None:
    source = Numbers(10)
    source.fingerprint = {"name": "numbers", "version": (1, 0)}
    found = pipeline.fingerprint([Stage(source, None, 4)], 0)
    assert found["stage 0 source"] == {"name": "numbers", "version": [1, 0]}
