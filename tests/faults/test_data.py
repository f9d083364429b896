"""Faults of the data: bad rows, another pipeline, too little of it (F14, F23, F24, F27)."""

import json
import logging
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest

from jaxmodels.data import fingerprints, text_lines, tokenizer
from jaxmodels.data.pipeline import PipelineOptions, Stage, eval_batches, train_batches
from jaxmodels.data.records import RecordError
from jaxmodels.vcc.task import make_task
from tests.faults import rows
from tests.faults.rows import Rows, example, row
from tests.train import runs
from tests.vcc import presets
from train import loop
from train.errors import RunError, UsageError

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01 and then nothing"
BAD = {
    "missing field": (
        {"label": None},
        r"field 'label' is missing; the record has 'text', 'weight'",
    ),
    "wrong dtype": ({"label": 1.5}, r"field 'label' is of type float64: integers are accepted"),
    "wrong shape": ({"weight": [1.0, 2.0]}, r"field 'weight' has shape \[2\]: \[3\] is accepted"),
    "empty text": ({"text": " "}, r"field 'text' is empty: 1 to 8 characters are accepted"),
    "over-long": ({"text": "x" * 9}, r"field 'text' has 9 characters: 1 to 8 characters are"),
    "label out of range": ({"label": 12}, r"field 'label' holds 12: 0 to 3 is accepted"),
    "invalid UTF-8": ({"text": b"ab\xff"}, r"field 'text' holds byte 0xff at 2: UTF-8 text is"),
    "corrupt JPEG": ({"image": JPEG}, r"field 'image' cannot be decoded .*a JPEG or PNG image is"),
}


def bad_rows(folder: pathlib.Path, count: int, bad: dict[int, dict[str, Any]]) -> Rows:
    made = [row(i, **bad.get(i, {})) for i in range(count)]
    return Rows(rows.write(folder / "train.jsonl", made))


def options(**settings: int) -> PipelineOptions:
    return PipelineOptions(**({"process_index": 0, "process_count": 1} | settings))


def take(iterator: Any, count: int) -> list[dict[str, np.ndarray]]:
    return [{k: np.array(v) for k, v in next(iterator).items()} for _ in range(count)]


def assert_same(first: list[Any], second: list[Any]) -> None:
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("kind", BAD)
def test_f23_a_bad_row_is_named_with_file_record_field_and_what_is_accepted(
    tmp_path: pathlib.Path, kind: str
) -> None:
    changes, said = BAD[kind]
    if "image" in changes:
        pytest.importorskip("PIL", reason="decoding images needs Pillow")
    source = bad_rows(tmp_path, 20, {13: changes})
    place = rf"record 13 \({re.escape(str(source.path))}, line 14\) of Rows\(20\): "
    with pytest.raises(RecordError, match=place + said):
        take(iter(train_batches([Stage(source, example, 4)], seed=0, options=options())), 5)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_f23_bad_rows_are_left_out_logged_once_and_counted_over_epochs_and_workers(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    source = bad_rows(tmp_path, 20, {3: {"label": 12}, 13: {"text": ""}})
    stages = [Stage(source, example, 4)]
    allowed = options(max_bad_records=2, num_workers=workers)
    iterator = iter(train_batches(stages, seed=0, options=allowed))
    with caplog.at_level(logging.WARNING):
        batches = take(iterator, 15)  # three epochs
    iterator.close()
    said = [record.message for record in caplog.records if "bad record" in record.message]
    assert len(said) == 2 and all("line " in text and "accepted" in text for text in said)
    assert iterator.get_state()["bad_records"] == "0/3 0/13"
    plain = iter(train_batches(stages, seed=0, options=options(max_bad_records=5)))
    assert_same(batches, take(plain, 15))
    strict = iter(
        train_batches(stages, seed=0, options=options(max_bad_records=1, num_workers=workers))
    )
    with pytest.raises(RecordError, match=r"more than max_bad_records=1 bad records; the last: re"):
        take(strict, 15)
    strict.close()


@pytest.mark.parametrize("stop", range(0, 12, 3))
def test_f23_the_same_rows_are_left_out_after_a_resume_and_none_is_counted_twice(
    tmp_path: pathlib.Path, stop: int
) -> None:
    source = bad_rows(tmp_path, 20, {i: {"label": 9} for i in (1, 5, 6, 17)})
    stages = [Stage(source, example, 4)]

    def fresh(limit: int = 4) -> Any:
        return iter(train_batches(stages, seed=0, options=options(max_bad_records=limit)))

    whole = fresh()
    take(whole, stop)
    state = json.loads(json.dumps(whole.get_state()))
    rest = take(whole, 12 - stop)
    resumed = fresh()
    resumed.set_state(state)
    assert_same(rest, take(resumed, 12 - stop))
    assert resumed.get_state() == whole.get_state()
    # Not forgotten either: the limit holds over both parts.
    found = len(state["bad_records"].split())
    if found < 4:
        strict = fresh(3)
        strict.set_state(state)
        with pytest.raises(RecordError, match="more than max_bad_records=3"):
            take(strict, 12 - stop)
    else:
        with pytest.raises(ValueError, match="4 bad records were left out so far, now max.*=3"):
            fresh(3).set_state(state)


def test_f23_lines_that_are_no_text_are_left_out_by_their_file_and_line(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"body": 1}\nno json\n{"text": "b"}\n')
    documents = text_lines.TextDocuments(path, max_bad_records=3)
    assert [documents[i]["text"] for i in range(len(documents))] == ["a", "b"]
    assert [f"line {i}" in r.message for i, r in zip((2, 3, 4), caplog.records, strict=True)]
    with pytest.raises(
        text_lines.TextError, match=r"more than max_bad_records=2.*t\.jsonl, line 4"
    ):
        text_lines.TextDocuments(path, max_bad_records=2)
    # What the source left out counts with what the transform refuses.
    stage = Stage(documents, only_a, 2)
    take(iter(train_batches([stage], seed=0, options=options(max_bad_records=4))), 2)
    with pytest.raises(RecordError, match=r"max_bad_records=3 .*record 1 \(.*line 5\).*only a"):
        take(iter(train_batches([stage], seed=0, options=options(max_bad_records=3))), 2)


def test_f23_a_text_task_trains_on_a_corpus_with_bad_lines_where_that_is_allowed(
    tmp_path: pathlib.Path,
) -> None:
    good = [json.dumps({"text": f"{presets.TEXT} Row {i} is {i * i}."}).encode() for i in range(60)]
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join([good[0], b'{"body": 1}', *good[1:], b'{"text": "\xff"}']))

    def batches(limit: int) -> Any:
        settings = presets.tiny_text(
            tmp_path, data__files=(str(path),), data__max_bad_records=limit
        )  # fmt: skip
        return make_task(settings).datasets("train")

    assert take(iter(batches(2)), 1)[0]["input_ids"].shape == (2, 96)
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 62: byte 0xff"):
        batches(1)
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 2: .*field 'text'"):
        batches(0)


def only_a(record: dict[str, Any], rng: np.random.Generator) -> dict[str, int]:
    if record["text"] != "a":
        raise ValueError("only a is accepted")
    return {"x": 1}


def config(folder: pathlib.Path, **changes: Any) -> Any:
    base = {"method": "tests.faults.rows", "data__dir": str(folder), "total_steps": 12}
    return runs.config(**(base | {"batch_size": 4, "checkpoint_every": 6} | changes))


def rerun_from_6(workdir: pathlib.Path) -> None:
    """Takes the workdir of 12 steps back to where it was killed after step 6."""
    shutil.rmtree(workdir / "checkpoints" / "12")


def test_f23_a_run_leaves_the_same_rows_out_after_a_resume(tmp_path: pathlib.Path) -> None:
    bad_rows(tmp_path / "data", 40, {i: {"label": 9} for i in (1, 5, 6, 17)})
    settings = config(tmp_path / "data", data__max_bad_records=4)
    loop.train(settings, tmp_path / "run")
    whole = runs.curve(tmp_path / "run")
    rerun_from_6(tmp_path / "run")
    loop.train(settings, tmp_path / "run")
    assert runs.curve(tmp_path / "run") == whole and len(whole) == 12


def test_f23_too_many_bad_rows_end_a_run_in_one_line(tmp_path: pathlib.Path) -> None:
    bad_rows(tmp_path / "data", 40, {i: {"label": 9} for i in (1, 5, 6, 17)})
    said = r"more than max_bad_records=2 bad records; the last: record \d+ \(.*train\.jsonl, line"
    with pytest.raises(RunError, match=said):
        loop.train(config(tmp_path / "data", data__max_bad_records=2), tmp_path / "run")


def stage_of(folder: pathlib.Path, count: int = 20, batch: int = 4, **changes: Any) -> Stage:
    return Stage(bad_rows(folder, count, {0: changes} if changes else {}), example, batch)


@pytest.mark.parametrize(
    ("after", "seed", "named"),
    [
        ({"batch": 5}, 0, ["stage 0 batch_size: saved 4, now 5"]),
        ({}, 3, ["seed: saved 0, now 3"]),
        ({"count": 18}, 0, ["records: saved 20, now 18", "sha256: saved", "batch_size"][:2]),
        ({"label": 3}, 0, ["stage 0 source/sha256: saved"]),
    ],
    ids=["batch", "seed", "filter", "version"],
)
def test_f14_another_pipeline_is_refused_naming_both_values(
    tmp_path: pathlib.Path, after: dict[str, Any], seed: int, named: list[str]
) -> None:
    before = train_batches([stage_of(tmp_path)], seed=0, options=options())
    now = train_batches([stage_of(tmp_path, **after)], seed=seed, options=options())
    with pytest.raises(ValueError, match="saved data position .* belongs to another"):
        iter(now).set_state(iter(before).get_state())
    lines = fingerprints.differences(before.fingerprint, now.fingerprint)
    assert len(lines) == len(named)
    assert all(any(text in line for line in lines) for text in named)


@pytest.mark.parametrize("change", [{"num_workers": 1}, {"prefetch": 5}, {"process_count": 2}])
def test_f14_other_workers_and_shards_give_the_same_batches(
    tmp_path: pathlib.Path, change: dict[str, int]
) -> None:
    stages = [stage_of(tmp_path)]
    whole = iter(train_batches(stages, seed=0, options=options()))
    take(whole, 3)
    other = iter(train_batches(stages, seed=0, options=options(**change)))
    other.set_state(whole.get_state())
    expected = take(whole, 4)
    if "process_count" in change:
        expected = [{k: v[:2] for k, v in batch.items()} for batch in expected]
    assert_same(expected, take(other, 4))
    other.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, ["batch_size", "4", "8"]),
        ({"seed": 7}, ["seed", "0", "7"]),
    ],
)
def test_f14_a_run_is_not_continued_with_other_settings_of_its_data(
    tmp_path: pathlib.Path, change: dict[str, int], named: list[str]
) -> None:
    stage_of(tmp_path / "data")
    loop.train(config(tmp_path / "data", total_steps=6), tmp_path / "run")
    with pytest.raises(UsageError) as caught:
        loop.train(config(tmp_path / "data", **change), tmp_path / "run")
    assert all(word in str(caught.value) for word in named)


def test_f14_a_run_is_not_continued_on_other_records_unless_told_to(
    tmp_path: pathlib.Path,
) -> None:
    stage_of(tmp_path / "data")
    loop.train(config(tmp_path / "data", total_steps=6), tmp_path / "run")
    old = rows.Rows(tmp_path / "data" / "train.jsonl").fingerprint["sha256"]
    new = stage_of(tmp_path / "data", label=2).source.fingerprint["sha256"]
    with pytest.raises(UsageError) as caught:
        loop.train(config(tmp_path / "data"), tmp_path / "run")
    assert old in str(caught.value) and new in str(caught.value)
    assert loop.train(config(tmp_path / "data"), tmp_path / "run", data_reset=True).step == 12


def test_f24_an_empty_split_or_too_few_records_are_an_error_before_compiling(
    tmp_path: pathlib.Path,
) -> None:
    rows.write(tmp_path / "data" / "train.jsonl", [])
    with pytest.raises(UsageError, match=r"Rows\(0\) has no records: check the split"):
        loop.train(config(tmp_path / "data"), tmp_path / "run")
    stage_of(tmp_path / "data", count=3)
    said = r"Rows\(3\) has 3 records, fewer than one global batch of 4: lower batch_size or add"
    with pytest.raises(UsageError, match=said):
        loop.train(config(tmp_path / "data"), tmp_path / "run")
    stage_of(tmp_path / "data")
    rows.write(tmp_path / "data" / "valid.jsonl", [])
    with pytest.raises(UsageError, match=r"Rows\(0\) has no records: check the split"):
        loop.train(config(tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "6").exists()


EVALUATE = """
import json, sys, jax
from tests.faults import rows
from tests.faults.test_data import config
from jaxmodels.core import partitioning
from train.evaluation import Evaluation
mesh, params = partitioning.make_mesh(), None
for size in map(int, sys.argv[2:]):
    task = rows.make_task(config(sys.argv[1], batch_size=size))
    params = params or jax.jit(lambda key: partitioning.unbox(task.init(key)))(jax.random.key(0))
    with jax.set_mesh(mesh):
        results = Evaluation(task, mesh).run(jax.device_put(params, partitioning.replicated(mesh)))
    print(json.dumps(results["valid"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_f24_a_padded_last_batch_changes_no_metric(tmp_path: pathlib.Path, devices: int) -> None:
    # 24 rows fill batches of 8 and 12; with 16 the last one is half padding.
    rows.write(tmp_path / "valid.jsonl", [row(i, weight=[1.0, 1.0, 1.0]) for i in range(24)])
    sizes = ("8", "12", "16")
    done = runs.python("-c", EVALUATE, str(tmp_path), *sizes, devices=devices)
    assert done.returncode == 0, done.stderr
    exact, other, padded = map(json.loads, done.stdout.splitlines()[-3:])
    assert exact["accuracy"] == other["accuracy"] == padded["accuracy"]
    assert 0 < exact["accuracy"] < 1
    # Sums of floats in another order: the last bit may differ.
    np.testing.assert_allclose(padded["loss"], exact["loss"], rtol=1e-6)


def test_f24_what_fills_the_last_batch_up_counts_exactly_nothing(tmp_path: pathlib.Path) -> None:
    rows.write(tmp_path / "valid.jsonl", [row(i) for i in range(10)])
    source = Rows(tmp_path / "valid.jsonl")
    batches = list(eval_batches(source, example, 4, options=options()))
    assert np.concatenate([b["weight"] for b in batches]).tolist() == [1.0] * 10 + [0.0] * 2
    task = rows.make_task(config(tmp_path))
    params = {
        "embedding": {"table": np.ones((64, 4), np.float32)},
        "hidden": {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)},
        "out": {"kernel": np.eye(4, dtype=np.float32), "bias": np.arange(4, dtype=np.float32)},
    }
    spoilt = {k: np.array(v) for k, v in batches[-1].items()}
    spoilt["label"][2:], spoilt["input_ids"][2:] = 3, 9
    for plain, other in zip(
        task.metrics(params, batches[-1]).values(), task.metrics(params, spoilt).values(),
        strict=True,
    ):  # fmt: skip
        assert tuple(map(float, plain)) == tuple(map(float, other))


def test_f27_another_tokenizer_is_another_pipeline_naming_both_digests(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "t.txt").write_text("some words of a text, and some more words\n" * 40)
    found = []
    for size in (270, 280):
        path = tmp_path / "given.json"  # the same path, another content
        tokenizer.train_bpe(["some words of a text"] * 9, size, (), path)
        windows = text_lines.load_windows(
            tmp_path / "t.txt", 16, data_dir=tmp_path, tokenizer_path=path
        )
        found.append(train_batches([Stage(windows, None, 2)], seed=0, options=options()))
    state = iter(found[0]).get_state()
    with pytest.raises(ValueError, match="belongs to another"):
        iter(found[1]).set_state(state)
    lines = fingerprints.differences(found[0].fingerprint, found[1].fingerprint)
    digests = [d.fingerprint["stage 0 source"]["tokenizer_sha256"] for d in found]
    assert any(all(digest in line for digest in digests) for line in lines)
