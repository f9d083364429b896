"""The tokenizers that are trained here."""

import pathlib

import pytest
from tokenizers import Tokenizer, models

from jaxmodels.data import cache_folder, facts_text, tokenizer

TEXTS = ["the cat sat on the mat, the dog did not", "of all the cats the dog liked one"] * 20


def test_special_tokens_have_robertas_ids(tmp_path: pathlib.Path) -> None:
    bpe = tokenizer.train_bpe(TEXTS, 300, (), tmp_path / "t.json")
    names = [bpe.id_to_token(i) for i in range(5)]
    assert names == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert [tokenizer.CLS_ID, tokenizer.PAD_ID, tokenizer.SEP_ID] == [0, 1, 2]
    assert [tokenizer.UNK_ID, tokenizer.MASK_ID] == [3, 4]


def test_training_twice_gives_the_same_file(tmp_path: pathlib.Path) -> None:
    digests = set()
    for name in ("a", "b"):
        tokenizer.train_bpe(TEXTS, 400, facts_text.TEMPLATE_WORDS, tmp_path / name)
        digests.add(cache_folder.sha256(tmp_path / name))
    assert len(digests) == 1


def test_guaranteed_words_are_one_token_although_the_text_lacks_them(
    tmp_path: pathlib.Path,
) -> None:
    bpe = tokenizer.train_bpe(TEXTS, 400, ("Quentin", "violet"), tmp_path / "t.json")
    assert [len(bpe.encode(f" {word}").ids) for word in ("Quentin", "violet")] == [1, 1]


def test_any_text_survives_encoding_and_decoding(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.json"
    tokenizer.train_bpe(TEXTS, 300, (), path)
    text = "  naïve\tcafé\n\n漢字 🙂 <mask> x=1"
    bpe = tokenizer.load(path)
    assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("size", "words"), [(100, ()), (270, facts_text.ALL_WORDS)])
def test_too_small_a_vocabulary_is_refused(
    tmp_path: pathlib.Path, size: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size={size} is too small"):
        tokenizer.train_bpe(TEXTS, size, words, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_what_is_no_tokenizer_is_refused_with_its_path(tmp_path: pathlib.Path) -> None:
    missing, garbage, other = (tmp_path / name for name in ("missing", "garbage", "other"))
    garbage.write_text("{}")
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(other))
    for path, reason in (
        (missing, "no tokenizer"),
        (garbage, "not a tok"),
        (other, "first ids"),
    ):
        with pytest.raises(ValueError, match=f"{path.name}.*{reason}|{reason}.*{path.name}"):
            tokenizer.load(path)
