"""Masked examples: how many tokens, which, and what becomes of them."""

import numpy as np
import pytest

from jaxmodels.core.losses import IGNORE
from jaxmodels.data import tokenizer
from jaxmodels.data.tokenizer import MASK_ID
from jaxmodels.smile.masking import DocumentExample, MaskedExample


def window(real: int, length: int = 200) -> dict[str, np.ndarray]:
    ids = np.full(length, 1, np.int32)
    ids[:real] = np.arange(10, 10 + real)
    ids[0], ids[real - 1] = 0, 2
    return {"input_ids": ids, "attention_mask": np.arange(length) < real}


def test_labels_stand_where_tokens_were_hidden_and_nothing_else_changes() -> None:
    record = window(120)
    made = MaskedExample(1000, 200)(record, np.random.default_rng(0))
    counted = made["masked_labels"] != IGNORE
    assert counted.sum() == round(0.15 * 118) and len(counted) == 30
    positions = made["masked_positions"][counted]
    assert len(set(positions)) == counted.sum()
    np.testing.assert_array_equal(made["masked_labels"][counted], record["input_ids"][positions])
    changed = np.flatnonzero(made["input_ids"] != record["input_ids"])
    assert set(changed) <= set(positions)
    assert 0 not in positions and 119 not in positions


def test_eight_of_ten_are_masked_one_is_another_one_stays() -> None:
    example, record = MaskedExample(1000, 200), window(200)
    kinds = np.zeros(3)
    for seed in range(200):
        made = example(record, np.random.default_rng(seed))
        now = made["input_ids"][made["masked_positions"]]
        masked, same = now == MASK_ID, now == made["masked_labels"]
        kinds += [masked.sum(), (~masked & ~same).sum(), same.sum()]
    assert kinds / kinds.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_a_window_without_tokens_predicts_nothing() -> None:
    record = window(2)
    made = MaskedExample(1000, 200)(record, np.random.default_rng(0))
    assert (made["masked_labels"] == IGNORE).all()
    np.testing.assert_array_equal(made["input_ids"], record["input_ids"])


def test_a_document_becomes_a_window_of_its_own_tokens(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    text = "one two three four five six seven eight nine ten " * 8
    bpe = tokenizer.train_bpe([text], 300, (), path)
    example = DocumentExample(str(path), MaskedExample(300, 32))
    every = bpe.encode(text, add_special_tokens=False).ids
    starts = set()
    for seed in range(4):
        made = example({"text": text.encode()}, np.random.default_rng(seed))
        ids = made["input_ids"].copy()
        counted = made["masked_labels"] != IGNORE
        ids[made["masked_positions"][counted]] = made["masked_labels"][counted]
        piece = ids[1:-1].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.CLS_ID, tokenizer.SEP_ID)
        found = [i for i in range(len(every)) if every[i : i + 30] == piece]
        assert found, piece
        starts.add(found[0])
    assert len(starts) > 1
    short = example({"text": "one"}, np.random.default_rng(0))
    assert short["attention_mask"].sum() == 2 + len(bpe.encode("one").ids)
