"""Text files of the user's, as documents or as windows of tokens for masked-LM training.

    source = text_lines.load_windows("corpus/*.txt", 512, data_dir="data")
    source[0]                         # {"input_ids": int32 [512], "attention_mask": bool [512]}
    source.tokenizer_path             # a BPE trained on the text, unless one is given

Files whose names end in .jsonl or .ndjson hold one JSON object a line, with the text in one of its
fields; all others hold plain text. Everything is UTF-8.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import bad_records, cache_folder, tokenizer

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
DOCUMENTS = ("line", "paragraph", "file")


class TextError(ValueError):
    """Text files that cannot be used; the message names the file and the line, if there is one."""


class TextDocuments:
    """Random access to documents: `{"text": str, "file": str, "line": int}`.

    The files are read once to find and check the documents; only their places stay in memory.

    Attributes:
      left_out: bad documents that were left out.
    """

    def __init__(
        self,
        files: Files,
        field: str | None = None,
        document: str = "line",
        *,
        max_bad_records: int = 0,
    ) -> None:
        """Finds the documents.

        Args:
          files: a path, a pattern such as "corpus/*.txt", or several of them.
          field: field of the text in .jsonl files; None means "text".
          document: what a document of a plain text file is: a "line", a "paragraph" (lines up to an
            empty one) or the whole "file". Empty ones are left out.
          max_bad_records: documents that may be invalid; each is logged and left out.

        Raises:
          TextError: no such file, no text in one, or more invalid documents than allowed: invalid
            UTF-8, or a line of a .jsonl file that is no JSON object or lacks the field.
        """
        if document not in DOCUMENTS:
            raise TextError(f"document={document!r}: accepted are {', '.join(DOCUMENTS)}")
        self.files = find_files(files)
        self.field, self.document = field or "text", document
        self.left_out, self._max_bad_records = 0, max_bad_records
        self.files_sha256 = [cache_folder.sha256(path) for path in self.files]
        places: list[tuple[int, int, int, int]] = []
        for number in range(len(self.files)):
            places += self._places_in(number)
        self._places = np.asarray(places)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the documents: contents of the files (not their places) and settings."""
        return {
            "name": "text_lines",
            "files_sha256": self.files_sha256,
            "field": self.field,
            "document": self.document,
            "records": len(self),
        }

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns document `index`.

        Raises:
          IndexError: there is no such document.
          TextError: the file was changed since, and the document is no longer valid.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number, start, stop, line = self._places[index].tolist()
        path = self.files[number]
        with open(path, "rb") as file:
            file.seek(start)
            text = _text(file.read(stop - start), path, line, self.field)
        return {"text": text, "file": str(path), "line": line}

    def where(self, index: int) -> str:
        """Returns file and line of document `index`."""
        number, _, _, line = self._places[index].tolist()
        return f"{self.files[number]}, line {line}"

    def __repr__(self) -> str:
        """Returns a short description."""
        more = f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""
        return f"TextDocuments({self.files[0]}{more}, {len(self)} documents)"

    def _places_in(self, number: int) -> list[tuple[int, int, int, int]]:
        """Returns (file, start, stop, line) of one file's documents, after checking every one."""
        path = self.files[number]
        unit = "line" if _is_jsonl(path) else self.document
        found = [
            (number, start, start + len(raw), line)
            for start, line, raw in _units(path, unit)
            if self._has_text(raw, path, line)
        ]
        if not found:
            raise TextError(f"{path}: there is no text in it; leave the file out or give another")
        return found

    def _has_text(self, raw: bytes, path: Path, line: int) -> bool:
        """Whether a document is to be kept; of a bad one, notes that it is left out."""
        try:
            return bool(_text(raw, path, line, self.field).strip())
        except TextError as error:
            self.left_out += 1
            if self.left_out <= self._max_bad_records:
                bad_records.log(self.left_out, self._max_bad_records, str(error))
                return False
            if not self._max_bad_records:
                raise
            raise TextError(
                f"more than max_bad_records={self._max_bad_records} bad records; the last: {error}"
            ) from error


class TextWindows:
    """Random access to windows: `input_ids [length]` int32 and `attention_mask [length]` bool.

    A window is `<s>`, `length - 2` tokens of the text, `</s>`; documents follow each other with
    `</s>` between them. Every token is in exactly one window; the last window is padded.

    Attributes:
      fingerprint: what identifies the windows, as JSON values.
      tokenizer_path: the tokenizer they were made with.
    """

    def __init__(
        self, tokens: np.ndarray, length: int, fingerprint: dict[str, Any], tokenizer_path: str
    ) -> None:
        """Cuts `tokens` `[n]` into windows; `load_windows` calls this."""
        self._tokens, self._length = tokens, length
        self.fingerprint, self.tokenizer_path = fingerprint, tokenizer_path

    def __len__(self) -> int:
        """Returns the number of windows."""
        return -(-len(self._tokens) // (self._length - 2))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns window `index`.

        Raises:
          IndexError: there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        inner = self._length - 2
        piece = self._tokens[index * inner : (index + 1) * inner]
        ids = np.full(self._length, tokenizer.PAD_ID, np.int32)
        ids[0] = tokenizer.CLS_ID
        ids[1 : len(piece) + 1] = piece
        ids[len(piece) + 1] = tokenizer.SEP_ID
        return {"input_ids": ids, "attention_mask": np.arange(self._length) < len(piece) + 2}

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"TextWindows({len(self)} windows of {self._length} tokens)"


def load_windows(
    files: Files,
    length: int,
    *,
    data_dir: str | os.PathLike[str],
    field: str | None = None,
    document: str = "line",
    tokenizer_path: str | os.PathLike[str] | None = None,
    vocab_size: int = 8000,
    min_windows: int = 1,
) -> TextWindows:
    """Encodes the text once, keeps the tokens in `data_dir`, and returns windows of them.

    Args:
      files: see `TextDocuments`, as `field` and `document`.
      length: tokens of a window, special tokens included.
      data_dir: folder of all data sets; tokens and tokenizer go to `text_lines` there.
      field: field of the text in .jsonl files; None means "text".
      document: "line", "paragraph" or "file".
      tokenizer_path: a tokenizer.json with RoBERTa's special tokens; None trains one on the text.
      vocab_size: ids of the BPE that is trained; unused with `tokenizer_path`.
      min_windows: fewer windows than this (a batch, say) are an error.

    Raises:
      TextError: see `TextDocuments`; or there are fewer than `min_windows` windows.
      ValueError: `length` is below 3, or the tokenizer cannot be used or trained.
    """
    if length < 3:
        raise ValueError(f"length={length}: <s>, text and </s> take 3 tokens or more")
    documents = TextDocuments(files, field, document)
    path = tokenizer_path or train_tokenizer(documents, data_dir=data_dir, vocab_size=vocab_size)
    bpe = tokenizer.load(path)
    settings = documents.fingerprint | {"tokenizer_sha256": cache_folder.sha256(path)}
    folder = _folder(data_dir, "tokens", settings)

    def build(work: Path) -> dict[str, Any]:
        tokens = _encode(documents, bpe)
        np.save(work / "tokens.npy", tokens)
        return {"tokens": len(tokens)}

    message = f"preparing text_lines: {documents!r} in {folder}"
    facts = cache_folder.ensure(folder, settings, build, message)["facts"]
    windows = TextWindows(
        np.load(folder / "tokens.npy", mmap_mode="r"),
        length,
        settings | facts | {"length": length},
        str(path),
    )
    if len(windows) < min_windows:
        raise TextError(
            f"{documents!r} gives {len(windows)} windows of {length} tokens, but {min_windows} are "
            "needed: give more text, shorter windows or a smaller batch"
        )
    return windows


def train_tokenizer(
    documents: TextDocuments, *, data_dir: str | os.PathLike[str], vocab_size: int = 8000
) -> str:
    """Returns the path of a BPE trained on the documents, kept in `data_dir`.

    Raises:
      ValueError: `vocab_size` is too small.
    """
    settings = documents.fingerprint | {"vocab_size": vocab_size}
    folder = _folder(data_dir, "tokenizer", settings)

    def build(work: Path) -> dict[str, Any]:
        texts = (documents[index]["text"] for index in range(len(documents)))
        tokenizer.train_bpe(texts, vocab_size, (), work / "tokenizer.json")
        return {}

    cache_folder.ensure(folder, settings, build, f"training a tokenizer on {documents!r}")
    return str(folder / "tokenizer.json")


def find_files(files: Files) -> list[Path]:
    """Returns the files that paths and patterns name, sorted within a pattern, each file once.

    Raises:
      TextError: one of them names no file.
    """
    patterns = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    if not patterns:
        raise TextError("no text files given: name a path, or a pattern such as corpus/*.txt")
    found: dict[Path, None] = {}
    for pattern in (os.path.expanduser(os.fspath(each)) for each in patterns):
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [Path(path) for path in paths if os.path.isfile(path)]
        if not matches:
            raise TextError(f"{pattern}: no such file, and none that matches it in {os.getcwd()}")
        found |= dict.fromkeys(matches)
    return list(found)


def _folder(data_dir: str | os.PathLike[str], kind: str, settings: dict[str, Any]) -> Path:
    return Path(data_dir) / "text_lines" / f"{kind}-{cache_folder.digest(settings)[:16]}"


def _units(path: Path, unit: str) -> Iterator[tuple[int, int, bytes]]:
    """Yields (first byte, first line, content) of each line, paragraph or file."""
    start, first, parts = 0, 1, []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            parts.append(line)
            if unit == "line" or (unit == "paragraph" and not line.strip()):
                content = b"".join(parts)
                yield start, first, content
                start, first, parts = start + len(content), number + 1, []
    if parts:
        yield start, first, b"".join(parts)


def _text(raw: bytes, path: Path, line: int, field: str) -> str:
    """Returns the text of a document that starts in `line`.

    Raises:
      TextError: it is not UTF-8 or, in a .jsonl file, no object with the field.
    """
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise TextError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; convert the file "
            "(iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
        ) from None
    if not _is_jsonl(path) or not text.strip():
        return text.strip("\r\n")
    try:
        row = json.loads(text)
    except ValueError as error:
        raise TextError(f"{path}, line {line}: not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise TextError(
            f"{path}, line {line}: an object with a text in field {field!r} is needed, found "
            f"{found}; name the field that holds the text"
        )
    return row[field]


def _is_jsonl(path: Path) -> bool:
    return path.suffix in (".jsonl", ".ndjson")


def _encode(documents: TextDocuments, bpe: Any, at_once: int = 1000) -> np.ndarray:
    """Returns the ids of all documents, a `</s>` between two, uint16 or int32 `[tokens]`."""
    dtype = np.uint16 if bpe.get_vocab_size() <= 2**16 else np.int32
    pieces = []
    for start in range(0, len(documents), at_once):
        texts = [documents[i]["text"] for i in range(start, min(start + at_once, len(documents)))]
        for encoded in bpe.encode_batch(texts, add_special_tokens=False):
            pieces.append(np.asarray([*encoded.ids, tokenizer.SEP_ID], dtype))
    return np.concatenate(pieces)[:-1]
