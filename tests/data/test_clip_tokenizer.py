"""CLIP's tokenizer: ids by hand on a small list of merges, and the published list where it is."""

import gzip
import os
import pathlib
import pickle
import random
import re
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest

from jaxmodels.data import clip_tokenizer
from jaxmodels.data.clip_tokenizer import ClipTokenizer, clean_text, load, merge_pairs

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(os.environ.get("JAXMODELS_SHARED", ROOT.parent / "shared"))
PUBLISHED = SHARED / "parity" / "pomp" / "clip_bpe_merges.npz"
NAMES = SHARED / "parity" / "pomp" / "in21k_class_names.npz"

# Ids 512 to 517; 518 and 519 are start and end.
MERGES = ("d o", "do g</w>", "c a", "ca t</w>", "a t</w>", "' s</w>")
DO, DOG, CA, CAT, AT, POSSESSIVE, START, END = range(512, 520)


@pytest.fixture(scope="module")
def small() -> ClipTokenizer:
    return ClipTokenizer(MERGES)


def last(letter: str) -> int:
    """Id of a letter that ends a word; "!" is the first of the byte symbols."""
    return 256 + ord(letter) - ord("!")


def _gzip(content: bytes) -> bytes:
    """Without the time of day: tests are named by the bytes, and two workers must agree."""
    return gzip.compress(content, mtime=0)


def write(path: pathlib.Path, lines: Sequence[str], ending: str = "\n") -> pathlib.Path:
    path.write_bytes("".join(line + ending for line in lines).encode())
    return path


def test_ids_are_those_worked_out_by_hand(small: ClipTokenizer) -> None:
    assert small.vocab_size == 520 and (small.start_id, small.end_id) == (START, END)
    assert small.encode("dog cat at") == [DOG, CAT, AT]
    assert small.encode("do") == [ord("d") - 33, last("o")]  # "do" is no whole word here
    assert small.encode("dogs") == [DO, ord("g") - 33, last("s")]
    assert small.encode("12") == [last("1"), last("2")]  # digits stand alone
    assert small.encode("cat's!?") == [CAT, POSSESSIVE, ord("!") - 33, last("?")]
    assert small.encode("") == small.encode(" \n ") == []


def test_bytes_that_do_not_print_have_symbols_after_those_that_do(small: ClipTokenizer) -> None:
    symbols = clip_tokenizer.byte_symbols()
    assert list(symbols)[:2] == [33, 34] and list(symbols)[188:190] == [0, 1]
    assert symbols[33] == "!" and symbols[0] == "\u0100" and symbols[0xAD] == "\u0143"
    assert len(set(symbols.values())) == 256
    # U+1F436 is f0 9f 90 b6 in UTF-8.
    ids = [list(symbols).index(byte) for byte in (0xF0, 0x9F, 0x90)]
    assert small.encode("\U0001f436") == [*ids, 256 + list(symbols).index(0xB6)]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\tDOG \n ", "a dog"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("sch\u00c3\u00b6n", "sch\u00f6n"),
        ("\u2018don\u2019t\u2019", "'don't'"),
        ("\ufb01ne\u00a0\uff26ull", "fine full"),
        ("lone \ud800 half", "lone \ufffd half"),
    ],
)
def test_text_is_repaired_unescaped_and_lowered(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_plain_text_that_is_not_given_to_ftfy_is_text_that_it_would_not_change() -> None:
    ftfy, rng = pytest.importorskip("ftfy"), random.Random(0)
    plain = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    for _ in range(500):
        text = "".join(rng.choices(plain, k=rng.randint(1, 40)))
        assert ftfy.fix_text(text) == text


def test_decoding_gives_the_cleaned_text_with_spaces_after_words(small: ClipTokenizer) -> None:
    assert small.decode(small.encode("Dog's caf\u00e9 7")) == "dog 's caf\u00e9 7 "
    assert small.decode(np.array([START, DOG, END])) == "<|startoftext|>dog <|endoftext|>"
    assert small.decode(small.encode("\u00e9")[:1]) == "\ufffd"  # half a letter


@pytest.mark.parametrize("token", [-1, 520])
def test_an_id_outside_the_vocabulary_is_refused(small: ClipTokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=rf"id {token} is not in the vocabulary: 0 to 519"):
        small.decode([DOG, token])


def test_rows_are_start_text_end_and_zeros(small: ClipTokenizer) -> None:
    rows = small(["dog", "dog cat at"], context_length=5)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, [[START, DOG, END, 0, 0], [START, DOG, CAT, AT, END]])
    np.testing.assert_array_equal(small("dog", 5), rows[:1])
    assert small("dog").shape == (1, 77) and small([]).shape == (0, 77)


def test_a_text_that_is_too_long_is_named_with_its_length(small: ClipTokenizer) -> None:
    texts = ["dog", "dog dog cat", "at"]
    message = r"1 of 3 texts do not fit into context_length=4, .*'dog dog cat' \(5 tokens\)"
    with pytest.raises(ValueError, match=message):
        small(texts, 4)
    rows = small(texts, 4, truncate=True)
    np.testing.assert_array_equal(rows[1], [START, DOG, DOG, END])


def test_many_texts_that_are_too_long_do_not_fill_the_screen(small: ClipTokenizer) -> None:
    with pytest.raises(ValueError, match="100 of 100 texts.* and 95 more"):
        small(["dog dog " * 1000] * 100, 4)


def test_a_row_without_room_for_start_and_end_is_refused(small: ClipTokenizer) -> None:
    with pytest.raises(ValueError, match="context_length=1 has no room"):
        small("dog", 1, truncate=True)


def test_a_special_token_in_a_text_is_encoded_or_refused_as_asked(small: ClipTokenizer) -> None:
    text = "dog <|EndOfText|> cat"
    assert small.encode(text) == [DOG, END, CAT]
    np.testing.assert_array_equal(small(text, 6), [[START, DOG, END, CAT, END, 0]])
    with pytest.raises(ValueError, match=r"'dog <\|EndOfText\|> cat' holds"):
        small(["at", text], allow_special=False)
    # Inside a run of other signs it is no special token, and harmless.
    assert END not in small.encode("!<|endoftext|>")
    assert small("!<|endoftext|>", allow_special=False).shape == (1, 77)


@pytest.mark.parametrize("text", [None, b"dog", 3, ["dog"]])
def test_what_is_no_text_is_refused(small: ClipTokenizer, text: object) -> None:
    with pytest.raises(ValueError, match="a text is needed"):
        small(["dog", text])


def test_the_cache_changes_no_id_and_stays_bounded(small: ClipTokenizer) -> None:
    bounded, without = ClipTokenizer(MERGES, cache_size=2), ClipTokenizer(MERGES, cache_size=0)
    texts = ["dog cat at do", "cat dogs at", "dog dog"] * 2
    for tokenizer in (bounded, without):
        np.testing.assert_array_equal(tokenizer(texts), small(texts))
    assert len(bounded._cache) == 2 and not without._cache


def test_a_tokenizer_can_be_sent_to_a_worker(small: ClipTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(copy(["Dog's"]), small(["Dog's"]))


def plain_merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The definition: in each round all places of the lowest-ranked pair, from left to right."""
    while pairs := [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]:
        best, merged, place = min(pairs, key=ranks.__getitem__), [], 0
        while place < len(symbols):
            found = tuple(symbols[place : place + 2]) == best
            merged.append("".join(best) if found else symbols[place])
            place += 2 if found else 1
        symbols = merged
    return symbols


def test_merging_follows_its_definition_on_random_words() -> None:
    rng = random.Random(0)
    for _ in range(20):
        known, ranks = list("abc"), {}
        while len(ranks) < 15:
            pair = (rng.choice(known), rng.choice(known))
            if "".join(pair) not in known:
                ranks[pair] = len(ranks)
                known.append("".join(pair))
        for _ in range(100):
            word = [rng.choice("abc") for _ in range(rng.randint(1, 30))]
            assert merge_pairs(word, ranks) == plain_merge(word, ranks)


def test_a_long_text_without_spaces_takes_no_quadratic_time(small: ClipTokenizer) -> None:
    start = time.process_time()
    assert len(small.encode("catdo" * 20_000)) == 3 * 20_000 + 1  # the last "do" ends a word
    assert time.process_time() - start < 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("header", ["", "#version: 0.2", '"merges.txt#version: 0.2'])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_files_of_both_publishers_are_read(
    tmp_path: pathlib.Path, small: ClipTokenizer, packed: bool, header: str, ending: str
) -> None:
    path = write(tmp_path / "merges", [header] * bool(header) + [*MERGES, "x y", "e r"], ending)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    tokenizer = load(path, num_merges=len(MERGES))
    assert tokenizer.vocab_size == small.vocab_size
    assert tokenizer.encode("dogs cat") == small.encode("dogs cat")


def test_pairs_in_memory_may_be_tuples(small: ClipTokenizer) -> None:
    pairs = [tuple(merge.split()) for merge in MERGES]
    assert ClipTokenizer(pairs).encode("dog's") == small.encode("dog's")


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (["d o", "dog"], r"merge 2 \('dog'\) is not a pair"),
        (["d  o"], "merge 1 .* is not a pair"),
        ([("d", "o", "g")], "merge 1 .* is not a pair"),
        (["d og</w>"], "merge 1 .* uses 'og</w>', which no earlier merge gives"),
        (["d o", "o g", "do g", "d og"], "merge 4 .* gives 'dog', which an earlier"),
    ],
)
def test_merges_that_build_no_vocabulary_are_refused(merges: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipTokenizer(merges)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 merges, 6 are needed"),
        ("\n".join(MERGES[:5]).encode(), "holds 5 merges, 6 are needed"),
        (_gzip(b"d o\n" * 500)[:-12], "is damaged, or cut"),
        (_gzip(b"d o\n" * 500)[:-8] + bytes(8), "is damaged, or cut"),
        (b"\x1f\x8bjunk", "is damaged, or cut"),
        (b"d o\n\xff\xfe\n", "is no UTF-8 text .byte 4"),
        (_gzip(b"\n" * (2**24 + 1)), "holds more than 16777216 bytes"),
        (b"\n" * (2**24 + 1), "holds more than 16777216 bytes"),
        (b"d o\nc a\ne r\nt h\ni n\na n", "none of its merges ends a word"),
        (b"d o\n\nc a\nt h\nt</w> h\ni n</w>", "merges: merge 2 .* is not a pair"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_path_and_where_to_get_one(
    tmp_path: pathlib.Path, content: bytes, message: str
) -> None:
    path = tmp_path / "merges"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path, num_merges=6)
    assert re.search(message, str(caught.value)), caught.value


def test_a_missing_file_or_a_folder_is_refused(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gz"):
        with pytest.raises(ValueError, match=f"no list of merges at {path}. Use bpe_simple"):
            load(path)


def test_a_file_of_another_model_is_too_short_by_default(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds 6 merges, 48894 are needed"):
        load(write(tmp_path / "merges", MERGES))


@pytest.mark.parametrize("package", ["ftfy", "regex"])
def test_without_an_optional_package_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'jaxmodels\[data\]'"):
        ClipTokenizer(MERGES)


@pytest.mark.skipif(not NAMES.is_file(), reason=f"no {NAMES}")
def test_twenty_thousand_names_take_less_than_five_seconds() -> None:
    def lines(path: pathlib.Path, key: str) -> list[str]:
        with np.load(path) as stored:
            return stored[key].tobytes().decode().removesuffix("\n").split("\n")

    tokenizer, names = ClipTokenizer(lines(PUBLISHED, "merges_utf8")), lines(NAMES, "names_utf8")
    assert tokenizer.vocab_size == 49_408
    start = time.process_time()
    rows = tokenizer([name.replace("_", " ") for name in names])
    assert time.process_time() - start < 5
    sizes = np.argmax(rows, axis=1) - 1
    assert rows.shape == (22_047, 77) and sizes.max() == 12 and round(sizes.mean(), 2) == 2.34
