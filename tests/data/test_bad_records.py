"""Counting bad records: distinct, limited, and in the state; fingerprints and states compared."""

import json
import pickle

import pytest

from jaxmodels.data import bad_records, fingerprints, pipeline, workers
from jaxmodels.data.bad_records import BadRecord, Tally
from jaxmodels.data.records import RecordError


def tally(limit: int = 2, left_out: int = 0) -> Tally:
    return Tally(limit, left_out, set())


def test_a_record_counts_once_however_often_it_comes() -> None:
    found = tally()
    for _ in range(3):
        found.add([BadRecord(0, 7, "a"), BadRecord(1, 7, "b")])
    assert found.state() == "0/7 1/7"
    with pytest.raises(RecordError, match="more than max_bad_records=2 bad records; the last: c"):
        found.add([BadRecord(0, 8, "c")])


def test_with_none_allowed_the_error_is_that_of_the_record() -> None:
    with pytest.raises(RecordError, match="^why$"):
        tally(0).add([BadRecord(0, 8, "why")])


def test_what_a_source_left_out_counts_too() -> None:
    with pytest.raises(RecordError, match="more than max_bad_records=2"):
        tally(2, left_out=2).add([BadRecord(0, 8, "c")])


def test_a_restored_tally_goes_on_where_it_was() -> None:
    found = tally()
    found.restore("0/7 2/11")
    found.add([BadRecord(2, 11, "b")])
    assert found.state() == "0/7 2/11"
    with pytest.raises(ValueError, match="2 bad records were left out so far, now .*=1: raise it"):
        tally(1).restore("0/7 2/11")
    for wrong in ("7", "0/x", 3):
        with pytest.raises(ValueError, match="is no list of bad records"):
            tally().restore(wrong)


def test_states_of_processes_are_joined_and_sorted_by_number() -> None:
    assert bad_records.union(["0/10 0/9", "", "1/1 0/9"]) == "0/9 0/10 1/1"
    states = [{"next_batch": 2, "bad_records": text} for text in ("0/3", "0/1")]
    assert pipeline.merged_state(states) == {"next_batch": 2, "bad_records": "0/1 0/3"}
    assert pipeline.merged_state([{"other": 1}] * 2) == {"other": 1}
    for apart in ([{"other": 1}, {"other": 2}], [states[0], states[1] | {"next_batch": 3}]):
        with pytest.raises(ValueError, match="different places"):
            pipeline.merged_state(apart)


def test_what_a_reset_loses_is_said_in_words() -> None:
    state = {"next_batch": 120, "fingerprint": "f", "bad_records": "0/1 0/2"}
    said = pipeline.what_is_lost(json.dumps(state))
    assert "batch 120" in said and "seen again" in said and "2 bad records" in said
    assert "seen again" in pipeline.what_is_lost("null")


def test_differences_of_fingerprints_name_each_value_of_both() -> None:
    saved = {"seed": 0, "source": {"version": "1.0.0", "files": [1, 2]}, "old": True}
    now = {"seed": 0, "source": {"version": "1.1.0", "files": [1]}, "new": {"a": 1}}
    assert fingerprints.differences(saved, now) == [
        'new: saved nothing, now {"a": 1}',
        "old: saved true, now nothing",
        "source/files: saved [1, 2], now [1]",
        'source/version: saved "1.0.0", now "1.1.0"',
    ]
    assert fingerprints.differences(saved, saved) == []
    assert fingerprints.differences(None, {"seed": 0}) == ['data: saved nothing, now {"seed": 0}']


class Unpicklable(Exception):
    """An error of a library that cannot travel."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def test_an_error_that_cannot_travel_arrives_as_text() -> None:
    error = Unpicklable(3, "codec broke")
    error.add_note("while reading record 6 of Clips(9)")
    sent = pickle.loads(pickle.dumps(workers.portable(error)))
    assert isinstance(sent, workers.WorkerError)
    assert str(sent) == (
        "Unpicklable in a data worker: codec broke; while reading record 6 of Clips(9)"
    )
    good = ValueError("plain")
    assert workers.portable(good) is good
