"""What every document of `pydoc_facts` promises, read back from its tokens."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jaxmodels.data import facts_documents, facts_text, tokenizer
from jaxmodels.data.facts_documents import FactsLayout, FactsVocabulary

LAYOUTS = [
    FactsLayout(64, 1, 1),
    FactsLayout(512, 4, 4),
    FactsLayout(515, 3, 5, facts_per_group=2, slot=16),
    FactsLayout(1024, 2, 8),
]


def make(
    layout: FactsLayout, bpe: Any, topics: dict[str, dict[str, str]], count: int, **other: int
) -> list[facts_documents.Document]:
    stream = facts_documents.token_stream(bpe, topics["train"])
    arguments = {"count": count, "seed": 0} | other
    return list(facts_documents.generate(layout, bpe, stream, **arguments))


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: str(layout.length))
def made(
    request: pytest.FixtureRequest, bpe: Any, topics: dict[str, dict[str, str]]
) -> tuple[FactsLayout, list[facts_documents.Document]]:
    return request.param, make(request.param, bpe, topics, 30)


def test_facts_are_where_their_positions_say(made: Any, vocabulary: FactsVocabulary) -> None:
    layout, documents = made
    for document in documents:
        facts = read_facts(document["input_ids"], vocabulary)
        assert sorted(facts) == document["fact_positions"].tolist()
        assert len(facts) == layout.num_facts


def test_keys_of_a_document_are_distinct(made: Any, vocabulary: FactsVocabulary) -> None:
    for document in made[1]:
        keys = [key for key, _ in read_facts(document["input_ids"], vocabulary).values()]
        assert len(set(keys)) == len(keys)


def test_each_group_lies_within_one_aligned_slot(made: Any) -> None:
    layout, documents = made
    for document in documents:
        groups = document["fact_positions"].reshape(layout.fact_groups, layout.facts_per_group)
        assert (np.diff(groups, axis=1) == facts_documents.FACT_LENGTH).all()
        first, last = groups[:, 0], groups[:, -1] + facts_documents.FACT_LENGTH - 1
        assert (first // layout.slot == last // layout.slot).all()
        assert len(set((first // layout.slot).tolist())) == layout.fact_groups


def test_no_key_is_parted_from_its_value_by_a_block_of_16(made: Any) -> None:
    for document in made[1]:
        keys = document["fact_positions"] + facts_documents.KEY_IN_FACT
        values = document["fact_positions"] + facts_documents.VALUE_IN_FACT
        assert made[0].slot != 32 or (keys // 16 == values // 16).all()


def test_questions_ask_for_planted_keys_and_answers_are_their_values(
    made: Any, vocabulary: FactsVocabulary
) -> None:
    layout, documents = made
    for document in documents:
        ids = document["input_ids"]
        facts = {key: value for key, value in read_facts(ids, vocabulary).values()}
        asked = ids[document["question_positions"]].tolist()
        assert len(set(asked)) == layout.questions
        values = [vocabulary.value_ids[answer] for answer in document["answers"]]
        assert values == [facts[key] for key in asked]
        assert ids[document["answer_positions"]].tolist() == values


def test_vip_tokens_are_start_and_questions(made: Any, bpe: Any) -> None:
    layout, documents = made
    for document in documents:
        assert document["num_vip"] == 1 + 7 * layout.questions
        text = bpe.decode(document["input_ids"][: layout.num_vip], skip_special_tokens=False)
        names = bpe.decode(document["input_ids"][document["question_positions"]]).split()
        assert text == "<s>" + "".join(f" what is the code of {name} ?" for name in names)


def test_documents_have_the_length_and_no_padding(made: Any) -> None:
    layout, documents = made
    for document in documents:
        assert document["input_ids"].shape == (layout.length,)
        assert not np.isin(document["input_ids"], [tokenizer.PAD_ID, tokenizer.MASK_ID]).any()


def test_the_rest_is_one_window_of_the_text(
    made: Any, bpe: Any, topics: dict[str, dict[str, str]]
) -> None:
    layout, documents = made
    stream = facts_documents.token_stream(bpe, topics["train"])
    around = np.concatenate([stream, stream]).tobytes()
    for document in documents[:5]:
        kept = np.ones(layout.length, bool)
        kept[: layout.num_vip] = False
        for start in document["fact_positions"]:
            kept[start : start + facts_documents.FACT_LENGTH] = False
        assert document["input_ids"][kept].tobytes() in around


def test_the_same_seed_gives_the_same_documents_and_another_gives_others(
    bpe: Any, topics: dict[str, dict[str, str]]
) -> None:
    first, again, seed, split = (
        [document["input_ids"].tolist() for document in make(LAYOUTS[0], bpe, topics, **settings)]
        for settings in ({"count": 5}, {"count": 300}, {"count": 5, "seed": 1},
                         {"count": 5, "split": 1})
    )  # fmt: skip
    assert first == again[:5]
    assert len({str(document) for document in again}) == 300
    assert all(a != b for a, b in zip(first, seed, strict=True))
    assert all(a != b for a, b in zip(first, split, strict=True))


def test_values_and_places_are_drawn_evenly(bpe: Any, topics: dict[str, dict[str, str]]) -> None:
    layout = FactsLayout(128, 1, 1)
    documents = make(layout, bpe, topics, 1500)
    answers = np.bincount([int(d["answers"][0]) for d in documents], minlength=16)
    slots = np.bincount([int(d["answer_positions"][0]) // 32 for d in documents], minlength=4)
    # Five standard deviations of a binomial count.
    assert (abs(answers - 1500 / 16) < 5 * np.sqrt(1500 / 16)).all()
    assert slots[0] == 0 and (abs(slots[1:] - 500) < 5 * np.sqrt(1500 * 2 / 9)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": 5}, "questions=5: 1 to 4"),
        ({"questions": 0}, "questions=0: 1 to 4"),
        ({"length": 63, "fact_groups": 1}, r"length=63: after 8 VIP .* Choose length >= 64"),
        ({"slot": 27}, "slot=27 tokens: choose slot >= 28"),
        ({"fact_groups": 17}, "68 facts, but there are 64 distinct keys"),
        ({"fact_groups": 0}, "fact_groups=0: at least 1"),
        ({"questions": 3, "fact_groups": 1, "facts_per_group": 2}, "exceeds the 2 planted"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactsLayout(**settings)


@hypothesis_settings(max_examples=25, deadline=None)
@given(questions=st.integers(1, 4), groups=st.integers(1, 8), extra=st.integers(0, 70))
def test_the_least_accepted_length_works_with_any_number_of_questions(
    bpe: Any, topics: dict[str, dict[str, str]], questions: int, groups: int, extra: int
) -> None:
    least = 32 * (1 + groups)
    with pytest.raises(ValueError, match=f"Choose length >= {least}"):
        FactsLayout(least - 1, questions, groups)
    (document,) = make(FactsLayout(least + extra, questions, groups), bpe, topics, 1)
    assert document["fact_positions"].min() >= 32


def test_no_topic_is_in_both_splits_and_none_is_lost() -> None:
    texts = facts_text.topics()
    split = facts_text.split_topics(texts)
    assert not split["train"].keys() & split["validation"].keys()
    assert split["train"] | split["validation"] == texts
    share = sum(map(len, split["validation"].values())) / sum(map(len, texts.values()))
    assert 0.1 < share < 0.25


def test_a_new_topic_moves_no_other_one_far() -> None:
    texts = {f"topic {i}": "x" * 1000 for i in range(50)}
    before = facts_text.split_topics(texts)["validation"].keys()
    after = facts_text.split_topics(texts | {"new": "y" * 1000})["validation"].keys()
    assert len(before ^ after) <= 2
    with pytest.raises(ValueError, match="1 topics cannot be split"):
        facts_text.split_topics({"one": "text"})


def test_a_tokenizer_without_the_words_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "t.json"
    tokenizer.train_bpe(["some text"], 300, (), path)
    with pytest.raises(ValueError, match="splits words of the facts .*amber"):
        facts_documents.vocabulary_of(str(path))


def test_a_decoded_document_shows_facts_and_marks(bpe: Any, topics: Any) -> None:
    (document,) = make(LAYOUTS[0], bpe, topics, 1)
    lines = facts_documents.decode(document["input_ids"], bpe, opened={1: ">"}).split("\n")
    assert lines[0].startswith("[     0]   <s> what is the code of ")
    assert lines[1].startswith("[    32] > ") and lines[1].count(" the code of ") == 4


def read_facts(ids: np.ndarray, vocabulary: FactsVocabulary) -> dict[int, tuple[int, int]]:
    """Finds every fact in the tokens: {position: (key id, value id)}."""
    keys, values = set(vocabulary.key_ids), set(vocabulary.value_ids)
    return {
        start: (int(ids[start + 3]), int(ids[start + 5]))
        for start in range(len(ids) - 6)
        if int(ids[start + 3]) in keys and int(ids[start + 5]) in values
    }
