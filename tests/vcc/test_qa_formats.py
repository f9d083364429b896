"""From published files to query, context and answer, as section 6 of the specification has them."""

import pathlib
from typing import Any

import numpy as np
import pytest

from jaxmodels.vcc import qa_formats, qa_sources
from tests.vcc import published_files


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("published")
    published_files.write(folder)
    return folder


def open_split(published: pathlib.Path, name: str, split: str = "train") -> Any:
    return qa_sources.open_split(name, split, data_dir=published / "data", path=published / name)


@pytest.mark.parametrize("name", qa_formats.FORMATS)
def test_each_published_file_becomes_the_papers_input(published: pathlib.Path, name: str) -> None:
    record = open_split(published, name)[0]
    chosen = qa_formats.get_format(name)
    found = (*chosen.inputs(record, qa_formats.in_order), chosen.answer(record))
    assert found == published_files.EXPECTED[name]
    assert len(open_split(published, name, "validation")) >= 1


def test_every_data_set_has_files_and_a_format() -> None:
    assert set(qa_sources.DATASETS) == {*qa_formats.FORMATS, "quality_articles"}


def test_splits_of_interviews_are_those_of_the_published_list(published: pathlib.Path) -> None:
    source = open_split(published, "media_sum", "validation")
    assert [source[i]["id"] for i in range(len(source))] == ["NPR-0", "CNN-2"]
    assert len(open_split(published, "media_sum", "train")) == 1


def test_the_archive_and_the_file_itself_are_found_too(published: pathlib.Path) -> None:
    archive = published / "wikihop" / "qangaroo_v1.1.zip"
    file = published / "hotpotqa" / "hotpot_dev_distractor_v1.json"
    for name, path in (("wikihop", archive), ("hotpotqa", file), ("hotpotqa", published)):
        source = qa_sources.open_split(name, "validation", data_dir=published / "data", path=path)
        assert len(source) in (1, 2)


def test_the_other_layouts_of_a_record_mean_the_same() -> None:
    columns = {
        "title": ["One", "Two"],
        "sentences": [["It is.", " In Rome."], np.array(["No."], dtype=object)],
    }
    record = published_files.HOTPOTQA | {"context": columns}
    inputs = qa_formats.get_format("hotpotqa").inputs(record, qa_formats.in_order)
    assert inputs == published_files.EXPECTED["hotpotqa"][:2]
    paper = {"article": "First .\nSecond .", "abstract": " In short . "}
    chosen = qa_formats.get_format("arxiv")
    assert (*chosen.inputs(paper, qa_formats.in_order), chosen.answer(paper)) == (
        published_files.EXPECTED["arxiv"]
    )
    listed = {"document": ["Hello.", "Good day."], "summary": "s"}
    assert qa_formats.get_format("media_sum").inputs(listed, qa_formats.in_order)[1] == (
        "Hello.\n\nGood day."
    )


def test_shuffles_keep_each_part_whole_and_depend_on_the_generator_alone() -> None:
    record = published_files.WIKIHOP | {
        "candidates": [f"c{i}" for i in range(8)],
        "supports": [f"s{i}" for i in range(8)],
    }
    inputs = qa_formats.get_format("wikihop").inputs

    def draw(seed: int) -> tuple[list[str], list[str]]:
        query, context = inputs(record, qa_formats.shuffled(np.random.default_rng(seed)))
        return query.split("[candidate]")[1:], context.split("[support]")[1:]

    assert draw(1) == draw(1) and draw(1) != draw(2)
    candidates, supports = draw(1)
    assert sorted(candidates) == record["candidates"] and sorted(supports) == record["supports"]
    assert [c[1] for c in candidates] != [s[1] for s in supports]  # two orders, not one


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hotpotqa", {"question": None}, "field 'question' is missing"),
        ("hotpotqa", {"context": [["One", [1]]]}, "field 'context': a list of"),
        ("hotpotqa", {"context": []}, "field 'context': a list of"),
        ("hotpotqa", {"context": {"title": ["a"], "sentences": []}}, "1 titles and 0 lists"),
        ("wikihop", {"candidates": []}, "field 'candidates' is empty"),
        ("wikihop", {"supports": "one"}, "field 'supports' is of type str"),
        ("wikihop", {"candidates": ["a", None]}, "field 'candidates' holds None"),
    ],
)
def test_a_bad_field_is_named(name: str, change: dict[str, Any], message: str) -> None:
    record = {"hotpotqa": published_files.HOTPOTQA, "wikihop": published_files.WIKIHOP}[name]
    with pytest.raises(ValueError, match=message):
        qa_formats.get_format(name).inputs(record | change, qa_formats.in_order)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qasper", "no blank line", "a question, a blank line and a document"),
        ("narrative_qa", "\n\nno question", "a question, a blank line and a document"),
        ("qmsum", "a\n\nb\n\nc", "has 3 parts between blank lines: 2 are accepted"),
        ("quality", "q\n (A) a\n (B) b\n (C) c\n text", "no option"),
        ("quality", "q\n (A) a\n (C) c\n (D) d\n text", r"no option \(B\) before"),
        ("gov_report", " ", "field 'input' is empty"),
    ],
)
def test_a_text_without_its_parts_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qa_formats.get_format(name).inputs({"input": text}, qa_formats.in_order)


def test_unanswered_records_are_refused() -> None:
    with pytest.raises(ValueError, match="field 'output' is missing"):
        qa_formats.get_format("qasper").answer({"input": "q\n\nd", "output": None})
    with pytest.raises(ValueError, match="field 'output' is empty"):
        qa_formats.get_format("qasper").answer({"input": "q\n\nd", "output": ""})


@pytest.mark.parametrize("name", qa_sources.DATASETS)
def test_absent_files_are_named_with_their_origin(tmp_path: pathlib.Path, name: str) -> None:
    known = qa_sources.DATASETS[name]
    with pytest.raises(ValueError, match=f"no {known.files['train']}.* in {tmp_path}") as caught:
        qa_sources.open_split(name, "train", data_dir=tmp_path, path=tmp_path)
    assert known.origin in str(caught.value) and "data.path" in str(caught.value)


def test_without_a_path_the_message_depends_on_tfds(tmp_path: pathlib.Path) -> None:
    def message(name: str, split: str = "train") -> str:
        with pytest.raises(ValueError) as caught:
            qa_sources.open_split(name, split, data_dir=tmp_path, tfds_dir=tmp_path)
        return str(caught.value)

    assert message("hotpotqa").startswith("hotpotqa is read from its published files")
    pytest.importorskip("tensorflow_datasets")
    assert "scrolls/qasper is not prepared" in message("qasper")
    assert "import tensorflow_datasets.text.scrolls.scrolls" in message("qasper")
    assert "Or set data.path to the folder that holds train.jsonl" in message("qasper")
    assert "no split 'test' with answers: use train or validation" in message("qasper", "test")
    assert "use one of hotpotqa" in message("squad")


def test_half_published_files_are_refused(published: pathlib.Path, tmp_path: pathlib.Path) -> None:
    dialogue = (published / "media_sum" / "news_dialogue.json").read_text()
    (tmp_path / "news_dialogue.json").write_text(dialogue)
    (tmp_path / "train.src.cleaned").write_text("One.\nTwo.\n")
    for name, wanted in (("media_sum", "train_val_test_split.json"), ("multi_news", "train.tgt")):
        with pytest.raises(ValueError, match=wanted):
            qa_sources.open_split(name, "train", data_dir=tmp_path, path=tmp_path)
    (tmp_path / "train.tgt").write_text("Only one.\n")
    with pytest.raises(ValueError, match="do not hold as many lines"):
        qa_sources.open_split("multi_news", "train", data_dir=tmp_path, path=tmp_path)
