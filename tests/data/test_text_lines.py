"""Text of the user's: what is read, and what is said about files that cannot be."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from jaxmodels.data import text_lines, tokenizer
from jaxmodels.data.text_lines import TextDocuments, TextError

LINES = ["first line", "", "  second  ", "third ünd last"]


@pytest.fixture
def plain(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "plain.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def texts(documents: TextDocuments) -> list[str]:
    return [documents[index]["text"] for index in range(len(documents))]


def test_lines_paragraphs_and_files_are_documents(plain: pathlib.Path) -> None:
    assert texts(TextDocuments(plain)) == ["first line", "  second  ", "third ünd last"]
    paragraphs = TextDocuments(plain, document="paragraph")
    assert texts(paragraphs) == ["first line", "  second  \nthird ünd last"]
    assert [paragraphs[i]["line"] for i in range(2)] == [1, 3]
    assert texts(TextDocuments(plain, document="file")) == ["\n".join(LINES)]


def test_jsonl_rows_give_their_field(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\nb", "body": "c"}\n\n{"text": "d", "body": "e"}\n')
    assert texts(TextDocuments(path)) == ["a\nb", "d"]
    assert texts(TextDocuments(path, field="body")) == ["c", "e"]


def test_patterns_lists_and_both_kinds_of_files_go_together(
    plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "json"}')
    (tmp_path / "a.txt").write_bytes("\ufeffwith mark\r\n".encode())
    found = TextDocuments([str(tmp_path / "*.txt"), tmp_path / "b.jsonl", plain])
    assert texts(found) == ["with mark", "first line", "  second  ", "third ünd last", "json"]
    assert found[0]["file"] == str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: there is no text in it"),
        ("blank.txt", b"\n \n\n", r"blank\.txt: there is no text in it"),
        ("latin.txt", b"good\nbad \xe9\n", r"latin\.txt, line 2: byte 0xe9 is not UTF-8"),
        ("row.jsonl", b'{"text": "a"}\n{"text": \n', r"row\.jsonl, line 2: not JSON"),
        ("field.jsonl", b'{"body": "a"}\n', r"field\.jsonl, line 1: .*'text'.*\['body'\]"),
        ("type.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"type\.jsonl, line 2: .*'text'"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1: .*found a list"),
        ("latin.jsonl", b'{"text": "a"}\n\xff\n', r"latin\.jsonl, line 2: byte 0xff"),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: pathlib.Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        TextDocuments(tmp_path / name)


def test_an_invalid_byte_inside_a_paragraph_has_its_own_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\n\ntwo\nthree \xff\nfour\n")
    for document in ("line", "paragraph", "file"):
        with pytest.raises(TextError, match=r"x\.txt, line 4: "):
            TextDocuments(tmp_path / "x.txt", document=document)


@pytest.mark.parametrize("files", ["nothing.txt", "no*.txt", ["nothing.txt"], "."])
def test_a_missing_file_or_pattern_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"(nothing\.txt|no\*\.txt|\.): no such file"):
        TextDocuments(files)
    with pytest.raises(TextError, match="no text files given"):
        TextDocuments([])


def test_an_unknown_kind_of_document_is_refused(plain: pathlib.Path) -> None:
    with pytest.raises(TextError, match="document='page': accepted are line, paragraph, file"):
        TextDocuments(plain, document="page")


def test_a_file_changed_after_opening_is_noticed(plain: pathlib.Path) -> None:
    documents = TextDocuments(plain)
    plain.write_bytes(b"\xff" * 100)
    with pytest.raises(TextError, match=r"plain\.txt, line 1"):
        documents[0]


def test_windows_hold_every_token_once(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    windows = text_lines.load_windows(plain, 8, data_dir=tmp_path, vocab_size=262)
    bpe = tokenizer.load(windows.tokenizer_path)
    wanted: list[int] = []
    for line in ("first line", "  second  ", "third ünd last"):
        wanted += [*bpe.encode(line).ids, 2]
    wanted.pop()
    found: list[int] = []
    for index in range(len(windows)):
        record = windows[index]
        ids = record["input_ids"][record["attention_mask"]].tolist()
        assert record["input_ids"].shape == (8,) and record["input_ids"].dtype == np.int32
        assert (record["input_ids"][~record["attention_mask"]] == 1).all()
        assert (ids[0], ids[-1]) == (0, 2)
        found += ids[1:-1]
    assert found == wanted
    with pytest.raises(IndexError, match="window 9 of"):
        windows[9 if len(windows) <= 9 else -1]


def test_tokens_are_kept_while_files_and_settings_stay(
    plain: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(**settings: str) -> text_lines.TextWindows:
        return text_lines.load_windows(
            plain, 8, data_dir=tmp_path / "data", vocab_size=262, **settings
        )

    first = load()
    assert "preparing text_lines" in capfd.readouterr().err
    assert load().fingerprint == first.fingerprint == json.loads(json.dumps(first.fingerprint))
    assert capfd.readouterr().err == ""
    moved = plain.rename(tmp_path / "moved.txt")
    shutil.copy(moved, plain)
    assert load().fingerprint == first.fingerprint
    assert load(document="file").fingerprint != first.fingerprint
    plain.write_text("other text, long enough for a window or two")
    assert load().fingerprint["files_sha256"] != first.fingerprint["files_sha256"]


def test_a_given_tokenizer_is_used_and_known_by_its_content(
    plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "given.json"
    tokenizer.train_bpe(["first second third line"] * 9, 290, (), path)
    windows = text_lines.load_windows(plain, 8, data_dir=tmp_path, tokenizer_path=path)
    assert windows.tokenizer_path == str(path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        text_lines.load_windows(plain, 8, data_dir=tmp_path, tokenizer_path=tmp_path / "none")


def test_too_few_windows_and_too_short_ones_are_refused(
    plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(TextError, match=r"plain\.txt.* gives 1 windows of 512 tokens, but 4 are"):
        text_lines.load_windows(plain, 512, data_dir=tmp_path, vocab_size=262, min_windows=4)
    with pytest.raises(ValueError, match="length=2"):
        text_lines.load_windows(plain, 2, data_dir=tmp_path)
