"""RoBERTa's question-answering examples: layout, VIP marks, labels, and the search for spans."""

import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest

from jaxmodels.data import json_records, tokenizer
from jaxmodels.vcc import qa_sources
from jaxmodels.vcc.choice_example import ChoiceExample, ChoiceSettings, quality_fields
from jaxmodels.vcc.hotpotqa_example import (
    HotpotQAExample,
    HotpotQASettings,
    find_spans,
    supporting_facts,
)

RNG = np.random.default_rng(0)
WORDS = [f"w{letter}" for letter in "bcdefghij"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    # every word is one token behind a space, and bytes without one
    tokenizer.train_bpe([" " + " ".join(WORDS)] * 5, 500, WORDS, path)
    return str(path)


WIKIHOP = {
    "query": " wb wc",
    "candidates": [" wd", " we wf"],
    "supports": [" wg wh wi", " wj"],
    "answer": " we wf",
}
HOTPOTQA = {
    "question": "wb  wc",
    "answer": "wg wh",
    "context": [["wd", ["we wf", "wg"]], ["wi", ["wh wg", " wg wh "]]],
    "supporting_facts": [["wi", 1]],
}


def words(example: Any, ids: np.ndarray, mask: np.ndarray) -> str:
    pieces = [example.tokenizer.id_to_token(int(i)).strip("Ġ") for i in ids[mask > 0]]
    return " ".join(pieces)


def test_question_and_candidates_lead_and_are_vip(path: str) -> None:
    example = ChoiceExample("wikihop", ChoiceSettings(24, 12, 4, shuffle=False), path)
    made = example(WIKIHOP, RNG)
    assert words(example, made["input_ids"], made["attention_mask"]) == (
        "[question] wb wc [/question] [ent] wd [/ent] [ent] we wf [/ent] "
        "<s> wg wh wi </s> <s> wj </s>"
    )
    assert made["vip_mask"].tolist() == [1] * 11 + [0] * 13
    assert made["candidate_positions"].tolist() == [4, 7, 0, 0]
    assert made["candidate_mask"].tolist() == [1, 1, 0, 0] and made["answer"] == 1
    assert made["position_ids"].tolist() == [*range(19), *[0] * 5]
    assert not made["token_type_ids"].any()
    assert (made["input_ids"][19:] == tokenizer.PAD_ID).all()
    assert all(array.dtype == np.int32 for array in made.values())


def test_each_part_has_a_type_and_the_last_support_is_cut(path: str) -> None:
    settings = ChoiceSettings(14, None, 2, num_types=5, shuffle=False)
    example = ChoiceExample("wikihop", settings, path)
    made = example(WIKIHOP, RNG)
    assert made["token_type_ids"].tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3] * 3
    assert words(example, made["input_ids"][11:], np.ones(3)) == "<s> wg wh"
    small = ChoiceExample("wikihop", ChoiceSettings(14, num_types=3, shuffle=False), path)
    with pytest.raises(ValueError, match="4 parts, each with a token type"):
        small(WIKIHOP, RNG)


def test_the_answer_moves_with_its_candidate(path: str) -> None:
    example = ChoiceExample("wikihop", ChoiceSettings(24, 12, 4), path)
    seen = set()
    for seed in range(8):
        made = example(WIKIHOP, np.random.default_rng(seed))
        at = made["candidate_positions"][made["answer"]]
        assert words(example, made["input_ids"][at + 1 : at + 3], np.ones(2)) == "we wf"
        seen.add(int(made["answer"]))
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"max_choices": 1}, {}, "2 candidates: at most 1"),
        ({"length": 10}, {}, "have 11 tokens, data.length=10"),
        ({"num_vip": 10}, {}, "11 VIP tokens, but num_vip=10"),
        ({}, {"answer": "wj"}, "field 'answer' holds 'wj', which is not among the candidates"),
        ({}, {"candidates": []}, "field 'candidates' is empty"),
    ],
)
def test_records_that_cannot_be_chosen_from_are_refused(
    path: str, settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    example = ChoiceExample("wikihop", ChoiceSettings(**({"length": 24} | settings)), path)
    with pytest.raises(ValueError, match=message):
        example(WIKIHOP | change, RNG)
    with pytest.raises(ValueError, match="use one of wikihop, quality_articles"):
        ChoiceExample("race", ChoiceSettings(24), path)


def test_articles_are_asked_each_of_their_questions(tmp_path: pathlib.Path) -> None:
    name = qa_sources.DATASETS["quality_articles"].files["train"]
    question = {"question": "Why?", "options": ["a", "b", "c", "d"], "gold_label": 3}
    rows = [
        {"article": "One.", "questions": [question, question | {"gold_label": 1}]},
        {"article": "Two.", "questions": "none"},
        {"article": "Three.", "questions": [question | {"gold_label": 5}]},
    ]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = qa_sources.open_split("quality_articles", "train", data_dir=tmp_path, path=tmp_path)
    assert [quality_fields(source[i])[2:] for i in range(2)] == [(["One."], 2), (["One."], 0)]
    assert source.where(1).endswith("line 1")
    with pytest.raises(ValueError, match="field 'questions': a list of objects"):
        source[2]
    with pytest.raises(ValueError, match="field 'gold_label' holds 5: 1 to 4"):
        quality_fields(source[len(source) - 1])


def test_hotpotqa_marks_paragraphs_sentences_and_the_first_answer(path: str) -> None:
    settings = HotpotQASettings(28, 4, 3, 6, shuffle=False, overflow="demote")
    example = HotpotQAExample(settings, path)
    made = example(HOTPOTQA, RNG)
    assert words(example, made["input_ids"], made["attention_mask"]) == (
        "[cls] [qs] wb wc [qe] [ts] wd [te] [ss] we wf [ss] wg [ts] wi [te] [ss] wh wg [ss] wg wh"
    )
    assert made["vip_mask"].tolist() == [1] * 5 + [0] * 23
    assert made["paragraph_positions"].tolist() == [5, 13, 0]
    assert made["paragraph_labels"].tolist() == [0, 1, -100]
    assert made["sentence_positions"].tolist() == [8, 11, 16, 19, 0, 0]
    assert made["sentence_labels"].tolist() == [0, 0, 0, 1, -100, -100]
    assert made["answer_type"] == 2 and (made["start"], made["end"]) == ([20], [21])
    assert example.decode(made["input_ids"], 2, 20, 21) == "wg wh"
    assert example.decode(made["input_ids"], 2, 18, 20) == "wg wg"  # without the sentence mark
    assert example.decode(made["input_ids"], 1, 0, 0) == "yes"


def test_yes_and_no_keep_the_official_order_and_have_no_span(path: str) -> None:
    example = HotpotQAExample(HotpotQASettings(28, shuffle=False), path)
    for answer, kind in (("no", 0), ("yes", 1), ("wj", 2)):
        made = example(HOTPOTQA | {"answer": answer}, RNG)
        assert made["answer_type"] == kind and made["start"] == made["end"] == [-100]


def test_what_begins_behind_the_end_is_not_labelled(path: str) -> None:
    settings = HotpotQASettings(12, None, 3, 6, num_types=3, mark_context=True, shuffle=False)
    made = HotpotQAExample(settings, path)(HOTPOTQA, RNG)
    assert made["paragraph_labels"].tolist() == [0, -100, -100]
    assert made["sentence_positions"].tolist() == [8, 11, 0, 0, 0, 0]
    assert made["sentence_labels"].tolist() == [0, 0, -100, -100, -100, -100]
    assert made["token_type_ids"].tolist() == [0] * 5 + [1] * 7
    assert made["vip_mask"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1]
    assert made["start"] == [-100]  # the answer is cut off


def test_spans_are_found_where_a_match_restarts_inside_another() -> None:
    assert find_spans([1, 1, 1, 2], [1, 1, 2], skipped=9) == [(1, 3)]
    assert find_spans([1, 2, 1, 2, 1], [1, 2, 1], skipped=9) == [(0, 2), (2, 4)]
    assert find_spans([5, 9, 6, 5, 6], [5, 6], skipped=9) == [(0, 2), (3, 4)]
    assert find_spans([9, 9], [1], skipped=9) == find_spans([1], [], skipped=9) == []


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"length": 4}, {}, "the question has 5 tokens, data.length=4"),
        ({"num_vip": 4}, {}, "5 VIP tokens, but num_vip=4"),
        ({"max_paragraphs": 1}, {}, "2 paragraphs: at most 1"),
        ({"num_types": 2}, {}, "3 parts, each with a token type"),
        ({}, {"supporting_facts": [["wd"]]}, "field 'supporting_facts': a list of"),
        ({}, {"supporting_facts": None}, "field 'supporting_facts' is missing"),
    ],
)
def test_records_without_a_usable_question_are_refused(
    path: str, settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    example = HotpotQAExample(HotpotQASettings(**({"length": 28} | settings)), path)
    with pytest.raises(ValueError, match=message):
        example(HOTPOTQA | change, RNG)


def test_both_layouts_of_the_facts_mean_the_same() -> None:
    columns = {"title": ["a", "a", "b"], "sent_id": [0, 2, 1]}
    rows = [["a", 0], ["a", 2], ["b", 1]]
    wanted = {"a": {0, 2}, "b": {1}}
    assert supporting_facts({"supporting_facts": columns}) == wanted
    assert supporting_facts({"supporting_facts": rows}) == wanted


def test_examples_travel_to_workers(path: str) -> None:
    for example, record in (
        (ChoiceExample("wikihop", ChoiceSettings(24, 12, 4, shuffle=False), path), WIKIHOP),
        (HotpotQAExample(HotpotQASettings(28, shuffle=False), path), HOTPOTQA),
    ):
        wanted = example(record, RNG)
        again = pickle.loads(pickle.dumps(example))
        np.testing.assert_equal(again(record, RNG), wanted)
        assert again.fingerprint == example.fingerprint


def test_an_article_without_questions_is_one_bad_record(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"article": "One.", "questions": []}\n')
    source = qa_sources.QuestionRecords(json_records.JsonLines([tmp_path / "a.jsonl"]))
    assert len(source) == 1
    with pytest.raises(ValueError, match="field 'questions': a list of objects"):
        source[0]
