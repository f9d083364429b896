"""Fine-tuning examples and batches: tokens, VIP marks, labels, scores."""

import json
import logging
import pathlib
import pickle
from typing import Any

import ml_collections
import numpy as np
import pytest

from jaxmodels.data import pipeline, t5_tokenizer
from jaxmodels.data.records import RecordError
from jaxmodels.vcc import qa_formats, qa_sources, seq2seq_data, seq2seq_scores
from jaxmodels.vcc.seq2seq_data import NumberedRecords, Seq2SeqData
from jaxmodels.vcc.seq2seq_example import Seq2SeqExample, Seq2SeqSettings
from tests.vcc import published_files

WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z which model paper we use one".split()
SMALL = Seq2SeqSettings(encoder_length=24, decoder_length=5, num_vip=16, shuffle=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("published")
    published_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    t5_tokenizer.train([" ".join(WORDS)] * 20, 200, path)
    return str(path)


def make(path: str, name: str = "qasper", **changes: Any) -> Seq2SeqExample:
    settings = {f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__} | changes
    return Seq2SeqExample(name, Seq2SeqSettings(**settings), path)


def test_every_format_equals_the_official_calls_of_the_tokenizer(
    published: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    letters = [(c, -6.0) for c in map(chr, range(33, 127))]
    words = [(f"▁{w}", -4.0) for w in ("the", "it", "One", "report", "is", "A", "Rome", "contract")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters, *words]
    for name, (query, context, answer) in published_files.EXPECTED.items():
        official = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
        official.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        official.add_tokens(list(qa_formats.get_format(name).added_tokens))
        record = qa_sources.open_split(name, "train", data_dir=tmp_path, path=published / name)[0]
        for n, length in ((40, 3), (400, 60)):
            ours = make(
                str(tmp_path / "tokenizer.json"),
                name,
                encoder_length=n,
                decoder_length=length,
                num_vip=None,
                long_query="warn",
            )(record, np.random.default_rng(0))

            def call(text: str, size: int, tokenizer: Any = official) -> Any:
                return tokenizer(text, padding="max_length", max_length=size, truncation=True)

            whole = call(query + "\n\n\n" + context, n)
            wanted = np.asarray(call(answer, length).input_ids)
            np.testing.assert_array_equal(ours["input_ids"], whole.input_ids)
            np.testing.assert_array_equal(ours["attention_mask"], whole.attention_mask)
            np.testing.assert_array_equal(ours["vip_mask"], call(query, n).attention_mask)
            np.testing.assert_array_equal(ours["labels"], np.where(wanted == 0, -100, wanted))


def test_marks_cover_the_query_and_one_token_more_unless_exact(tokenizer_path: str) -> None:
    example = make(tokenizer_path)
    made = example.encode("which model", "we use one paper")
    ids = example.tokenizer.encode("which model we use one paper", add_special_tokens=False).ids
    assert len(ids) == 6
    assert made["input_ids"].tolist() == [*ids, 1, *[0] * 17]
    assert made["attention_mask"].tolist() == [1] * 7 + [0] * 17
    assert made["vip_mask"].tolist() == [1] * 3 + [0] * 21
    exact = make(tokenizer_path, exact_vip=True).encode("which model", "we use one paper")
    assert exact["vip_mask"].tolist() == [1] * 2 + [0] * 22
    assert {array.dtype for array in made.values()} == {np.dtype(np.int32)}
    # nothing after the query: the mark falls on end-of-sequence, never on padding
    alone = example.encode("which model", " ")
    assert alone["attention_mask"].sum() == alone["vip_mask"].sum() == 3


def test_long_context_and_answer_are_cut_before_end_of_sequence(tokenizer_path: str) -> None:
    example = make(tokenizer_path)
    made = example.encode("which model", "paper " * 500)
    paper = example.tokenizer.token_to_id("▁paper")
    assert made["input_ids"].tolist()[2:] == [paper] * 21 + [1]
    assert made["attention_mask"].all()
    assert example.labels("we use one paper").tolist()[-1] == 1
    assert len(example.labels("we use one paper a b c")) == 5
    assert example.labels("we use one paper a b c")[-1] == 1
    assert example.labels("we").tolist()[1:] == [1, -100, -100, -100]


def test_a_query_that_does_not_fit_is_an_error_or_a_warning(
    tokenizer_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    fits, cut = "a " * 23, "a " * 24  # with its end: 24 and 25 tokens
    assert make(tokenizer_path, num_vip=24).encode(fits, "b")["vip_mask"].sum() == 24
    with pytest.raises(ValueError, match="query has 24 tokens and an end, but data.length=24"):
        make(tokenizer_path, num_vip=24).encode(cut, "b")
    with caplog.at_level(logging.WARNING):
        made = make(tokenizer_path, num_vip=24, long_query="warn").encode(cut, "b")
    assert made["vip_mask"].sum() == 24 and "VIP tokens are cut" in caplog.text


def test_a_query_with_more_tokens_than_slots_follows_the_policy(tokenizer_path: str) -> None:
    query = "a " * 16
    with pytest.raises(ValueError, match="17 VIP tokens, but num_vip=16 slots"):
        make(tokenizer_path).encode(query, "b")
    assert make(tokenizer_path, exact_vip=True).encode(query, "b")["vip_mask"].sum() == 16
    assert make(tokenizer_path, overflow="demote").encode(query, "b")["vip_mask"].sum() == 17
    assert make(tokenizer_path, num_vip=None).encode(query, "b")["vip_mask"].sum() == 17


def test_generated_ids_become_text_up_to_their_end(tokenizer_path: str) -> None:
    example = make(tokenizer_path)
    ids = example.tokenizer.encode("we use one", add_special_tokens=False).ids
    assert example.decode([0, *ids, 1, ids[0], 0]) == "we use one"
    assert example.decode(np.asarray([1, 5])) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_length": 3}, "encoder_length=3: at least 4"),
        ({"decoder_length": 1}, "decoder_length=1: at least 2"),
        ({"long_query": "cut"}, "long_query='cut': use one of error, warn"),
        ({"overflow": "drop"}, "overflow='drop': use one of error, warn, demote"),
    ],
)
def test_impossible_settings_are_refused(
    tokenizer_path: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer_path, **change)
    with pytest.raises(ValueError, match="no format for 'squad'"):
        make(tokenizer_path, "squad")


def write_rows(folder: pathlib.Path, count: int = 6) -> pathlib.Path:
    """Qasper rows: two questions with two answers each, the rest with one."""
    rows = [
        {
            "id": f"q{i // 2 if i < 4 else i}",
            "input": f"which {WORDS[i]}\n\nwe use one",
            "output": o,
        }
        for i, o in enumerate(("a b", "c d", "e", "f", "g h", "i")[:count])
    ]
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_rows(tmp_path / "rows")


def open_data(rows: pathlib.Path, tokenizer: str | None, **more: Any) -> Seq2SeqData:
    name, settings = more.pop("name", "qasper"), more.pop("settings", SMALL)
    options = {"vocab_size": 256, "data_dir": rows / "data", "path": rows} | more
    return Seq2SeqData(name, settings, tokenizer=tokenizer, **options)


def test_batches_hold_the_contract_and_resume_exactly(
    rows: pathlib.Path, tokenizer_path: str
) -> None:
    data = open_data(rows, tokenizer_path)
    iterator = iter(data.train_batches(4, seed=3))
    batch = next(iterator)
    shapes = {"input_ids": 24, "attention_mask": 24, "vip_mask": 24, "labels": 5}
    assert {k: v.shape for k, v in batch.items()} == {k: (4, n) for k, n in shapes.items()}
    assert all(v.dtype == np.int32 for v in batch.values())
    state = iterator.get_state()
    wanted = [next(iterator) for _ in range(3)]
    again = iter(open_data(rows, tokenizer_path).train_batches(4, seed=3))
    again.set_state(state)
    for batch in wanted:
        np.testing.assert_equal(next(again), batch)
    other = open_data(rows, tokenizer_path, settings=Seq2SeqSettings(24, 5, 16, exact_vip=True))
    with pytest.raises(ValueError, match="belongs to another data set"):
        iter(other.train_batches(4, seed=3)).set_state(state)


def test_paragraphs_are_shuffled_anew_in_training_and_alike_in_every_evaluation(
    tmp_path: pathlib.Path, tokenizer_path: str
) -> None:
    record = published_files.WIKIHOP | {"candidates": WORDS[:6], "supports": WORDS[6:14]}
    (tmp_path / "train.json").write_text(json.dumps([record]))
    (tmp_path / "dev.json").write_text(json.dumps([record]))
    settings = Seq2SeqSettings(64, 5, 40)
    data = open_data(tmp_path, tokenizer_path, name="wikihop", settings=settings)
    iterator = iter(data.train_batches(1, seed=0))
    orders = {next(iterator)["input_ids"].tobytes() for _ in range(6)}
    assert len(orders) == 6
    one, two = (next(iter(data.eval_batches("validation", 1))) for _ in range(2))
    np.testing.assert_equal(one, two)


def test_scores_are_exact_means_over_the_untruncated_answers(
    rows: pathlib.Path, tokenizer_path: str
) -> None:
    settings = Seq2SeqSettings(24, 2, 16)  # labels hold one token: "a b" is cut
    data = open_data(rows, tokenizer_path, settings=settings)
    batches = list(data.eval_batches("validation", 4))
    assert [b["record"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 5, 5]]
    assert [b["weight"].tolist() for b in batches] == [[1] * 4, [1, 1, 0, 0]]
    generated = [(b, np.where(b["labels"] < 0, 0, b["labels"])) for b in batches]
    found = data.scores("validation", generated)
    # e, f and i are whole; of "c d" and "g h" one word of two, F1 2/3; of "a b" an article
    assert found == pytest.approx({"exact_match": 3 / 6, "f1": (3 + 2 * 2 / 3) / 6, "count": 6})
    with pytest.raises(ValueError, match="record 0 of .* was judged before"):
        data.scores("validation", [generated[0], generated[0]])
    with pytest.raises(ValueError, match="no predictions"):
        data.scores("validation", [])


def test_questions_with_several_answers_are_asked_once_and_judged_by_the_best(
    rows: pathlib.Path, tokenizer_path: str
) -> None:
    data = open_data(rows, tokenizer_path, references="all")
    records = data.records("validation")
    assert [records.references(i) for i in range(len(records))] == [
        ["a b", "c d"], ["e", "f"], ["g h"], ["i"],
    ]  # fmt: skip
    assert records.where(1).endswith("line 3") and records[1]["record"] == 1
    batch = next(iter(data.eval_batches("validation", 4)))
    answers = ("c d", "f", "g", "x")
    ids = [data.example.labels(a) for a in answers]
    found = data.scores("validation", [(batch, np.where(np.stack(ids) < 0, 0, ids))])
    assert found["exact_match"] == 0.5
    with pytest.raises(ValueError, match="references='best': use one of single, all"):
        open_data(rows, tokenizer_path, references="best")


def test_a_bad_record_is_named_by_file_line_and_field(
    rows: pathlib.Path, tokenizer_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = rows / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[1], lines[3] = '{"id": "q", "input": "no question", "output": "a"}', "{"
    path.write_text("\n".join(lines) + "\n")
    data = open_data(rows, tokenizer_path)
    with pytest.raises(RecordError, match=r"record \d \(.*train.jsonl, line [24]\)") as caught:
        list(zip(range(3), data.train_batches(2, seed=0), strict=False))
    assert "field 'input'" in str(caught.value) or "not JSON" in str(caught.value)
    options = pipeline.PipelineOptions(max_bad_records=2)
    with caplog.at_level(logging.WARNING):
        iterator = iter(data.train_batches(2, seed=0, options=options))
        for _ in range(6):
            next(iterator)
    assert "field 'input': a question, a blank line and a document are accepted" in caplog.text
    assert "the line is not JSON" in caplog.text


def test_a_tokenizer_is_trained_on_the_data_where_none_is_given(rows: pathlib.Path) -> None:
    data = open_data(rows, None)
    assert next(iter(data.train_batches(2, seed=0)))["input_ids"].max() < 256
    assert open_data(rows, None).tokenizer_path == data.tokenizer_path


def test_a_word_table_too_small_for_the_added_tokens_is_refused(
    rows: pathlib.Path, tokenizer_path: str
) -> None:
    ids = t5_tokenizer.load(tokenizer_path).get_vocab_size()
    assert open_data(rows, tokenizer_path, vocab_size=ids).tokenizer_path == tokenizer_path
    with pytest.raises(ValueError, match=f"the 6 that hotpotqa adds.*at least {ids + 6}"):
        _ = open_data(rows, tokenizer_path, vocab_size=ids, name="hotpotqa").tokenizer_path


def test_transforms_travel_to_workers_without_the_opened_tokenizer(tokenizer_path: str) -> None:
    example = make(tokenizer_path)
    wanted = example.encode("which", "one")
    again = pickle.loads(pickle.dumps(example))
    assert again._tokenizer is None and again.fingerprint == example.fingerprint
    np.testing.assert_equal(again.encode("which", "one"), wanted)


def test_numbered_records_leave_bad_ones_to_the_batches() -> None:
    class Rows(list):
        fingerprint = {"name": "rows"}

        def __getitem__(self, index: int) -> Any:
            if index == 1:
                raise ValueError("bad")
            return {"id": "same", "output": str(index)}

    records = NumberedRecords(Rows(range(3)), lambda record: record["output"], "all")
    assert len(records) == 2 and records.references(0) == ["0", "2"]
    with pytest.raises(ValueError, match="bad"):
        records[1]


def test_a_config_becomes_a_data_set(rows: pathlib.Path, tokenizer_path: str) -> None:
    config = ml_collections.ConfigDict(
        {
            "data": {
                "name": "qasper", "path": str(rows), "tfds_dir": None, "dir": str(rows / "data"),
                "tokenizer": tokenizer_path, "length": 24, "target_length": 5, "exact_vip": True,
                "long_query": "warn", "shuffle": False, "references": "all",
            },
            "model": {
                "vocab_size": 256, "num_vip": 16, "overflow": "demote", "encoder": "vcc",
                "layer_kinds": (),
            },
        }
    )  # fmt: skip
    data = seq2seq_data.data_from(config)
    assert data.settings == Seq2SeqSettings(24, 5, 16, True, "demote", "warn", False)
    assert len(data.records("validation")) == 4
    config.model.layer_kinds = ("local", "dense")
    assert seq2seq_data.data_from(config).settings.num_vip is None


def test_a_split_is_generated_and_judged_batch_by_batch(
    rows: pathlib.Path, tokenizer_path: str
) -> None:
    data = open_data(rows, tokenizer_path)
    config = {"batch_size": 4, "data": {"name": "qasper", "num_workers": 0, "max_bad_records": 0}}

    class Parrot:
        """Generates the labels of every record but the last."""

        def __init__(self, data: Any) -> None:
            self.data, self.config = data, ml_collections.ConfigDict(config)

        def generate(self, params: Any, batch: Any) -> Any:
            ids = np.where(batch["labels"] < 0, 0, batch["labels"])
            ids[batch["record"] == 5] = 1
            return type("Generated", (), {"sequences": np.pad(ids, ((0, 0), (1, 0)))})

    found = seq2seq_scores.text_scores(Parrot(data), None)
    assert found == pytest.approx({"exact_match": 5 / 6, "f1": 5 / 6, "count": 6})
    assert seq2seq_scores.text_scores(Parrot(data), None, batches=1)["count"] == 4
    with pytest.raises(ValueError, match="data.name='qasper' has no answers in text"):
        seq2seq_scores.text_scores(Parrot(object()), None)
