"""The data set on disk: built once, read back exactly, without TensorFlow."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jaxmodels.data import facts_documents, pydoc_facts
from tests.data.conftest import SMALL


def test_records_are_the_generated_documents(
    small: pydoc_facts.FactsSource, bpe: Any, topics: dict[str, dict[str, str]]
) -> None:
    stream = facts_documents.token_stream(bpe, topics["train"])
    documents = facts_documents.generate(SMALL.layout, bpe, stream, count=40, seed=0)
    assert len(small) == 40
    for index, document in enumerate(documents):
        record = small[index]
        assert record["input_ids"].dtype == np.int32
        assert record["vip_mask"].dtype == record["attention_mask"].dtype == np.bool_
        assert record["vip_mask"].sum() == record["vip_mask"][: document["num_vip"]].sum() == 15
        assert record["attention_mask"].all()
        for name in ("input_ids", "question_positions", "answers", "answer_positions"):
            np.testing.assert_array_equal(record[name], document[name])
        np.testing.assert_array_equal(record["fact_positions"], document["fact_positions"])


def test_validation_is_made_of_other_topics(
    data_dir: pathlib.Path, bpe: Any, topics: dict[str, dict[str, str]]
) -> None:
    source = pydoc_facts.load(data_dir, "validation", SMALL)
    stream = facts_documents.token_stream(bpe, topics["validation"])
    documents = facts_documents.generate(SMALL.layout, bpe, stream, count=10, seed=0, split=1)
    for index, document in enumerate(documents):
        np.testing.assert_array_equal(source[index]["input_ids"], document["input_ids"])


def test_key_and_value_ids_are_distinct_single_tokens(
    vocabulary: pydoc_facts.FactsVocabulary,
) -> None:
    ids = vocabulary.key_ids + vocabulary.value_ids
    assert (len(vocabulary.key_ids), len(vocabulary.value_ids)) == (64, 16)
    assert len(set(ids)) == 80 and 4 < min(ids) and max(ids) < vocabulary.size == 2000


def test_second_use_opens_and_prints_nothing(
    data_dir: pathlib.Path,
    small: pydoc_facts.FactsSource,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pydoc_facts, "_write_records", pytest.fail)
    again = pydoc_facts.load(data_dir, "train", SMALL)
    assert again.fingerprint == small.fingerprint
    assert capfd.readouterr() == ("", "")


def test_building_prints_one_line(
    data_dir: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pydoc_facts.load(data_dir, "train", SMALL, seed=7, train_documents=3)
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("preparing pydoc_facts: 3 + 10 documents of 128 tokens in ")


@pytest.mark.parametrize("damage", ["records", "tokenizer", "partial"])
def test_damage_is_repaired_to_the_same_fingerprint(
    data_dir: pathlib.Path, small: pydoc_facts.FactsSource, tmp_path: pathlib.Path, damage: str
) -> None:
    root = tmp_path / "pydoc_facts"
    shutil.copytree(data_dir / "pydoc_facts" / SMALL.name, root / SMALL.name)
    shutil.copytree(data_dir / "pydoc_facts" / "tokenizer_bpe2000", root / "tokenizer_bpe2000")
    (records,) = root.glob("*/1.0.0/*-train.array_record*")
    target = root / "tokenizer_bpe2000" / "tokenizer.json" if damage == "tokenizer" else records
    content = bytearray(target.read_bytes())
    if damage == "partial":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    target.write_bytes(content)
    repaired = pydoc_facts.load(tmp_path, "train", SMALL)
    assert repaired.fingerprint == small.fingerprint
    np.testing.assert_array_equal(repaired[39]["input_ids"], small[39]["input_ids"])


def test_fingerprint_says_what_the_data_is(
    data_dir: pathlib.Path,
    small: pydoc_facts.FactsSource,
    vocabulary: pydoc_facts.FactsVocabulary,
) -> None:
    found = pydoc_facts.source_fingerprint(data_dir, "train", SMALL)
    assert found == json.loads(json.dumps(found)) == small.fingerprint
    assert found["version"] == "1.0.0" and found["records"] == 40
    assert found["settings"] == dataclasses.asdict(SMALL)
    assert found["tokenizer_sha256"] == vocabulary.tokenizer_sha256
    other = pydoc_facts.source_fingerprint(data_dir, "validation", SMALL)
    assert other["files_sha256"] != found["files_sha256"]


def test_all_lengths_share_the_tokenizer(
    data_dir: pathlib.Path, small: pydoc_facts.FactsSource
) -> None:
    longer = pydoc_facts.load(data_dir, "train", SMALL, length=256, train_documents=2)
    assert longer.fingerprint["tokenizer_sha256"] == small.fingerprint["tokenizer_sha256"]


def test_a_source_survives_pickling(small: pydoc_facts.FactsSource) -> None:
    copy = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(copy[3]["input_ids"], small[3]["input_ids"])


@pytest.mark.parametrize(
    ("split", "settings", "message"),
    [
        ("test", {}, "split='test': pydoc_facts has train and validation"),
        ("train", {"train_documents": 0}, "split 'train' is empty"),
        ("train", {"train_documents": -1}, "train_documents=-1: 0 or more"),
        ("train", {"train_documents": 0, "validation_documents": 0}, "nothing to build"),
        ("train", {"length": 64, "fact_groups": 8}, "do not fit into length=64"),
        ("train", {"vocab_size": 300}, "vocab_size=300 is too small"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: pathlib.Path, split: str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pydoc_facts.load(tmp_path, split, **settings)


def test_a_record_out_of_range_is_an_index_error(small: pydoc_facts.FactsSource) -> None:
    for index in (-1, 40):
        with pytest.raises(IndexError, match=f"document {index} of 40 in pydoc_facts"):
            small[index]


def test_no_module_is_loaded_too_early_and_tensorflow_never(tmp_path: pathlib.Path) -> None:
    program = """
import sys
from jaxmodels.data import pipeline, pydoc_facts, text_lines
heavy = {"grain", "tensorflow_datasets", "tokenizers", "tensorflow", "array_record"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
source = pydoc_facts.load(sys.argv[1], "train", length=64, fact_groups=1, train_documents=8)
batch = next(iter(pipeline.train_batches([pipeline.Stage(source, None, 4)], seed=0)))
assert batch["input_ids"].shape == (4, 64)
assert "tensorflow" not in sys.modules
"""
    root = str(pathlib.Path(pydoc_facts.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
