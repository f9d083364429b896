"""Tokenizers of T5's kind: which are refused, and what reading the start of a long text gives."""

import pathlib
from typing import Any

import pytest

from jaxmodels.data import t5_tokenizer, tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog"] * 5 + ["pack my box with five liquor jugs"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    t5_tokenizer.train(TEXTS, 140, path)
    return path


def test_training_twice_gives_one_file(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    t5_tokenizer.train(iter(TEXTS), 140, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="128 or more"):
        t5_tokenizer.train(TEXTS, 20, tmp_path / "small.json")


def test_white_space_of_any_kind_is_one_space(path: pathlib.Path) -> None:
    bpe = t5_tokenizer.load(path)
    spread = bpe.encode("the\n\n\n quick \t fox ", add_special_tokens=False).ids
    assert spread == bpe.encode("the quick fox", add_special_tokens=False).ids
    assert bpe.decode(spread) == "the quick fox"
    assert bpe.encode("the fox").ids[-1] == t5_tokenizer.EOS_ID


def test_added_tokens_follow_the_last_id_in_their_order(path: pathlib.Path) -> None:
    plain, more = t5_tokenizer.load(path), t5_tokenizer.load(path, ["[qs]", "fox", "[qe]"])
    size = plain.get_vocab_size()
    assert more.token_to_id("[qs]") == size
    ids = more.encode("[qs]the dog[qe]", add_special_tokens=False).ids
    assert ids[0] == size and ids[-1] == more.token_to_id("[qe]") == more.get_vocab_size() - 1


def test_other_files_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at .*T5's tokenizer.json"):
        t5_tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        t5_tokenizer.load(tmp_path / "bad.json")
    tokenizer.train_bpe(TEXTS, 270, (), tmp_path / "roberta.json")
    with pytest.raises(ValueError, match="T5-type tokenizer"):
        t5_tokenizer.load(tmp_path / "roberta.json")


class Counting:
    """A tokenizer that knows the longest text it was given."""

    def __init__(self, bpe: Any) -> None:
        self._bpe, self.longest = bpe, 0

    def encode(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self._bpe.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bpe, name)


@pytest.mark.parametrize("space", [" ", "\n", " " * 20])
def test_the_start_of_a_long_text_is_that_of_the_whole(path: pathlib.Path, space: str) -> None:
    bpe = Counting(t5_tokenizer.load(path))
    text = space.join(TEXTS[i % 6] for i in range(300))
    text = text.replace(" ", space)
    whole = t5_tokenizer.load(path).encode(text, add_special_tokens=False).ids
    for count in (1, 50, 700):
        bpe.longest = 0
        assert t5_tokenizer.encode_start(bpe, text, count) == whole[:count]
        if len(space) == 1 and count < 700:
            assert bpe.longest < len(text) / 2
    assert t5_tokenizer.encode_start(bpe, text, 10**6) == whole


def test_a_tokenizer_that_joins_words_reads_the_whole_text(tmp_path: pathlib.Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    assert not t5_tokenizer.splits_on_space(bpe)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    assert t5_tokenizer.splits_on_space(bpe)
