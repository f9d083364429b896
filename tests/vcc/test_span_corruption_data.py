"""Span-corruption pre-training from text files: packing, sentinels, exact resume, bad settings."""

import dataclasses
import pathlib
import pickle
from typing import Any

import ml_collections
import numpy as np
import pytest

from jaxmodels.data import t5_tokenizer, text_lines
from jaxmodels.vcc import span_corruption_data
from jaxmodels.vcc.packed_text import PackedText
from jaxmodels.vcc.span_corruption import SpanCorruption
from jaxmodels.vcc.span_corruption_data import SpanCorruptionData, TextFiles, TfdsCorpus

WORDS = [f"w{i}" for i in range(40)]
SETTINGS = SpanCorruption(vocab_size=300, inputs_length=48)  # 3 spans of 8 noise tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name, count in (("train.txt", 60), ("held.txt", 8)):
        paragraphs = [" ".join(rng.choice(WORDS, 20)) + "." for _ in range(count)]
        (folder / name).write_text("\n\n".join(paragraphs))
    t5_tokenizer.train([" ".join(WORDS)] * 20, 200, folder / "tokenizer.json")
    return folder


def open_data(folder: pathlib.Path, **more: Any) -> SpanCorruptionData:
    settings = more.pop("settings", SETTINGS)
    text = more.pop("text", None) or TextFiles(
        (str(folder / "train.txt"),), (str(folder / "held.txt"),)
    )
    options = {"num_vip": 4, "data_dir": folder / "data", "tokenizer": folder / "tokenizer.json"}
    return SpanCorruptionData(settings, text, **(options | more))


def test_batches_hold_the_contract_and_rebuild_the_text(folder: pathlib.Path) -> None:
    data = open_data(folder)
    sizes = data.settings.lengths
    batch = next(iter(data.train_batches(4, seed=0)))
    shapes = {
        "input_ids": 48, "attention_mask": 48, "vip_mask": 48, "labels": sizes.targets_length,
    }  # fmt: skip
    assert {k: v.shape for k, v in batch.items()} == {k: (4, n) for k, n in shapes.items()}
    assert all(v.dtype == np.int32 for v in batch.values())
    assert batch["vip_mask"].sum(axis=1).tolist() == [sizes.num_spans] * 4 == [3] * 4
    source, encode = data.source("train"), t5_tokenizer.load(data.tokenizer_path).encode
    texts = [encode(source[i]["text"], add_special_tokens=False).ids for i in range(len(source))]
    for row in range(4):
        raw = fill_in(batch["input_ids"][row], batch["labels"][row], sizes.num_spans)
        assert len(raw) == sizes.raw_tokens_length
        assert any(
            raw == text[i : i + len(raw)] for text in texts for i in range(len(text) - len(raw) + 1)
        )


def fill_in(ids: np.ndarray, labels: np.ndarray, spans: int) -> list[int]:
    """Puts the text of the labels back in place of the input's sentinels."""
    first = 300 - 1 - spans
    noise: list[list[int]] = []
    for token in labels.tolist()[:-1]:  # sentinel j of the labels stands for kept text j
        if token >= first:
            noise.append([])
        else:
            noise[-1].append(token)
    filled = []
    for token in ids.tolist()[:-1]:
        filled += noise[300 - 2 - token] if token >= first else [token]
    return filled


def test_a_run_resumes_exactly_and_a_seed_decides_it(folder: pathlib.Path) -> None:
    iterator = iter(open_data(folder).train_batches(2, seed=5))
    next(iterator)
    state = iterator.get_state()
    wanted = [next(iterator) for _ in range(3)]
    again = iter(open_data(folder).train_batches(2, seed=5))
    again.set_state(state)
    for batch in wanted:
        np.testing.assert_equal(next(again), batch)
    other = next(iter(open_data(folder).train_batches(2, seed=6)))
    assert not np.array_equal(other["input_ids"], wanted[0]["input_ids"])


def test_evaluations_corrupt_the_held_out_text_alike(folder: pathlib.Path) -> None:
    data = open_data(folder)
    assert data.has_validation()
    one, two = (list(data.eval_batches("validation", 2)) for _ in range(2))
    np.testing.assert_equal(one, two)
    assert sum(b["weight"].sum() for b in one) == len(data.source("validation"))
    only = open_data(folder, text=TextFiles((str(folder / "train.txt"),)))
    assert not only.has_validation()
    with pytest.raises(ValueError, match="validation_files is empty"):
        only.eval_batches("validation", 2)


def test_short_text_is_padded_and_its_padding_not_learnt(folder: pathlib.Path) -> None:
    (folder / "short.txt").write_text("w1 w2 w3 w4 w5")
    data = open_data(folder, text=TextFiles((str(folder / "short.txt"),)))
    batch = next(iter(data.train_batches(1, seed=0)))
    assert (batch["labels"] == -100).any() and not (batch["labels"] == 0).any()
    assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()
    assert (batch["vip_mask"] <= batch["attention_mask"]).all()


def test_a_tokenizer_trained_here_leaves_room_for_the_sentinels(folder: pathlib.Path) -> None:
    settings = dataclasses.replace(SETTINGS, vocab_size=140)
    data = open_data(folder, tokenizer=None, settings=settings)
    ids = t5_tokenizer.load(data.tokenizer_path).get_vocab_size()
    assert ids <= 140 - 1 - 3 and data.settings.vip_threshold == ids
    assert next(iter(data.train_batches(1, seed=0)))["vip_mask"].sum() == 3


def test_the_papers_threshold_stays_below_the_sentinels(folder: pathlib.Path) -> None:
    paper = SpanCorruption(vocab_size=38_000, inputs_length=4096)
    data = open_data(folder, settings=paper, num_vip=224)
    assert data.settings.vip_threshold == 33_000
    assert data.settings.lengths.num_spans == 224


def test_impossible_settings_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has 3 spans, each a VIP token, but model.num_vip=2"):
        open_data(folder, num_vip=2)
    ids = t5_tokenizer.load(folder / "tokenizer.json").get_vocab_size()
    small = dataclasses.replace(SETTINGS, vocab_size=ids + 3)
    with pytest.raises(ValueError, match=f"raise model.vocab_size to {ids + 4} or more"):
        _ = open_data(folder, settings=small).settings
    assert (
        open_data(
            folder, settings=dataclasses.replace(SETTINGS, vocab_size=ids + 4)
        ).settings.first_vip_id
        == ids
    )
    with pytest.raises(ValueError, match="data.files is empty"):
        TextFiles(())
    with pytest.raises(ValueError, match="no such file"):
        TextFiles((str(folder / "absent.txt"),))
    with pytest.raises(ValueError, match="data.tfds needs data.tokenizer"):
        open_data(folder, text=TfdsCorpus("wikipedia/20220620.en"), tokenizer=None)


def test_a_tfds_corpus_is_read_in_its_slices(folder: pathlib.Path, monkeypatch: Any) -> None:
    opened = []

    def open_split(name: str, split: str, *, data_dir: Any) -> Any:
        opened.append((name, split, data_dir))
        return text_lines.TextDocuments(str(folder / "held.txt"), document="paragraph")

    monkeypatch.setattr(span_corruption_data.tfds_text, "open_split", open_split)
    data = open_data(folder, text=TfdsCorpus("wiki", folder="there"))
    assert next(iter(data.train_batches(2, seed=0)))["input_ids"].shape == (2, 48)
    list(data.eval_batches("validation", 2))
    assert opened == [("wiki", "train[1%:]", "there"), ("wiki", "train[:1%]", "there")]


def test_documents_are_joined_without_marks_between_sentences(folder: pathlib.Path) -> None:
    (folder / "two.txt").write_text("One. Two.\n\nThree.")
    documents = text_lines.TextDocuments(str(folder / "two.txt"), document="paragraph")
    plain = PackedText(documents, 100, mark_sentences=False)
    assert plain[0]["text"] == "One. Two.</s></s>Three."
    marked = PackedText(documents, 100)
    assert marked[0]["text"] == "One.</s>Two.</s></s>Three."
    assert plain.fingerprint != marked.fingerprint
    assert "mark_sentences" not in marked.fingerprint


def test_packing_is_kept_and_read_again(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    documents = text_lines.TextDocuments(str(folder / "train.txt"), document="paragraph")
    kept = PackedText(documents, 60, data_dir=tmp_path)

    class Unread:
        fingerprint, left_out = documents.fingerprint, 0

        def __len__(self) -> int:
            return len(documents)

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("the documents were read again")

    again = PackedText(Unread(), 60, data_dir=tmp_path)
    assert len(again) == len(kept) == len(PackedText(documents, 60)) == 20


def test_transforms_travel_to_workers(folder: pathlib.Path) -> None:
    data = open_data(folder)
    record = data.source("train")[0]
    wanted = data.example(record, np.random.default_rng(1))
    again = pickle.loads(pickle.dumps(data.example))
    np.testing.assert_equal(again(record, np.random.default_rng(1)), wanted)
    assert again.fingerprint == data.example.fingerprint


def test_a_config_becomes_pre_training_data(folder: pathlib.Path) -> None:
    config = ml_collections.ConfigDict(
        {
            "data": {
                "files": (str(folder / "train.txt"),), "validation_files": (), "field": None,
                "tfds": "", "tfds_splits": ("train", "validation"), "tfds_dir": None,
                "dir": str(folder / "data"), "tokenizer": str(folder / "tokenizer.json"),
                "max_bad_records": 2, "length": 48, "noise_density": 0.148,
                "mean_span_length": 3.0,
            },
            "model": {"vocab_size": 300, "num_vip": 4, "encoder": "vcc", "layer_kinds": ()},
        }
    )  # fmt: skip
    data = span_corruption_data.data_from(config)
    assert data.text.max_bad_records == 2 and data.num_vip == 4
    np.testing.assert_equal(
        next(iter(data.train_batches(2, seed=0))),
        next(iter(open_data(folder).train_batches(2, seed=0))),
    )
    config.data.tfds = "wiki"
    with pytest.raises(ValueError, match="both name text"):
        span_corruption_data.data_from(config)
    config.data.files = ()
    corpus = span_corruption_data.data_from(config).text
    assert corpus == TfdsCorpus("wiki", "train", "validation", None)
