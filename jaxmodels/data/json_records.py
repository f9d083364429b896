"""JSON files as published data sets have them, as sources with random access.

    json_records.JsonLines(["train.jsonl"])[7]                        # one object a line
    json_records.open_array("hotpot_train_v1.1.json", data_dir="d")   # one list of objects
    json_records.open_member("qasper.zip", "qasper/train.jsonl", data_dir="d")

A list and a member of an archive are rewritten once, as lines, into `data_dir`.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxmodels.data import cache_folder

_CHUNK = 1 << 20
_WHITE = " \t\r\n,"


class JsonLines:
    """Random access to the objects of files with one JSON object a line; empty lines are left out.

    The files are read once to find the lines; a bad line is an error when it is asked for.
    """

    left_out = 0

    def __init__(self, files: Sequence[str | os.PathLike[str]], name: str = "") -> None:
        """Finds the lines.

        Args:
          files: one file or more, in order.
          name: shown in place of the files' paths, where these mean nothing to the user.

        Raises:
          ValueError: a file is missing, or there is no line in any of them.
        """
        self.files, self._name = [Path(file) for file in files], name
        self._digests: list[str] = []
        places: list[np.ndarray] = []
        for number, path in enumerate(self.files):
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
            found, digest = _lines(path)
            places.append(np.pad(found, ((0, 0), (1, 0)), constant_values=number))
            self._digests.append(digest)
        self._places = np.concatenate(places) if places else np.zeros((0, 4), np.int64)
        if not len(self._places):
            raise ValueError(f"{self._shown()}: there is no line in it")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the records: contents of the files, not their places."""
        return {"name": "json_lines", "files_sha256": self._digests, "records": len(self)}

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns record `index`.

        Raises:
          IndexError: there is no such record.
          ValueError: its line is not UTF-8, not JSON, or no object.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self._shown()}")
        number, start, stop, _ = self._places[index].tolist()
        with open(self.files[number], "rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"the line is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"the line is a JSON {type(value).__name__}: an object is needed")
        return value

    def where(self, index: int) -> str:
        """Returns file and line of record `index`."""
        number, _, _, line = self._places[index].tolist()
        return f"{self._name or self.files[number]}, line {line}"

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"JsonLines({self._shown()}, {len(self)} records)"

    def _shown(self) -> str:
        return self._name or ", ".join(map(str, self.files)) or "no files"


def open_array(
    path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str],
    keep: Callable[[dict[str, Any]], bool] | None = None,
    kept: str = "",
) -> JsonLines:
    """Opens a file that is one JSON list of objects.

    Args:
      path: the file; "archive.zip::member" names a member of an archive.
      data_dir: folder of all prepared data; the lines go to `json_records` there.
      keep: which objects to keep; None keeps all.
      kept: names `keep`: what it keeps must depend on this text and the file alone.

    Raises:
      ValueError: no such file, or it is not a list of objects.
    """
    return _rewritten(path, data_dir, kept, lambda file: _objects(file, path, keep))


def open_member(
    archive: str | os.PathLike[str], member: str, *, data_dir: str | os.PathLike[str]
) -> JsonLines:
    """Opens a file with one JSON object a line that lies in a zip archive.

    Raises:
      ValueError: no such archive, or no such member.
    """
    return _rewritten(f"{os.fspath(archive)}::{member}", data_dir, "", lambda file: file)


def array_elements(file: TextIO, name: str) -> Iterator[Any]:
    """Yields the elements of a JSON list without holding the list in memory.

    Args:
      file: opened for text.
      name: of the file, for errors.

    Raises:
      ValueError: it is not one JSON list, or it ends too early.
    """
    decoder, number, position = json.JSONDecoder(), 0, 1
    buffer = file.read(_CHUNK).lstrip("\ufeff" + _WHITE)
    if not buffer.startswith("["):
        raise ValueError(f"{name}: a JSON list is needed, it starts with {buffer[:20]!r}")
    while True:
        while position < len(buffer) and buffer[position] in _WHITE:
            position += 1
        if buffer[position : position + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer, position)
        except ValueError as error:
            more = file.read(max(_CHUNK, len(buffer) - position))
            if not more:
                raise ValueError(
                    f"{name}: element {number} cannot be read ({error}): the file is cut or "
                    "damaged, get it again"
                ) from None
            buffer, position = buffer[position:] + more, 0
            continue
        yield value
        number, position = number + 1, end
        if position > _CHUNK:
            buffer, position = buffer[position:], 0


def open_text(path: str | os.PathLike[str]) -> TextIO:
    """Opens a UTF-8 text file, or the member of a zip archive that "archive.zip::member" names.

    Raises:
      ValueError: there is no such file, archive or member.
    """
    archive, _, member = os.fspath(path).partition("::")
    if not os.path.isfile(archive):
        raise ValueError(f"{archive}: no such file")
    if not member:
        return open(archive, encoding="utf-8")
    try:
        return io.TextIOWrapper(_Member(archive, member), encoding="utf-8")
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} has no member {member}, or is no zip archive: {error}") from (
            None
        )


class _Member(io.BufferedReader):
    """A member of an archive; closing it closes the archive too."""

    def __init__(self, archive: str, member: str) -> None:
        self._archive = zipfile.ZipFile(archive)
        super().__init__(self._archive.open(member))

    def close(self) -> None:
        super().close()
        self._archive.close()


def _rewritten(
    path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    kept: str,
    lines: Callable[[TextIO], Iterable[str]],
) -> JsonLines:
    """Returns the lines of a file, written once under `data_dir`."""
    with open_text(path):  # absent files are told before anything is hashed
        pass
    name = os.fspath(path)
    settings = {
        "sha256": cache_folder.sha256(name.partition("::")[0]),
        "member": name.partition("::")[2],
        "kept": kept,
    }
    folder = Path(data_dir) / "json_records" / cache_folder.digest(settings)[:16]

    def build(work: Path) -> dict[str, Any]:
        with open_text(path) as file, open(work / "records.jsonl", "w", encoding="utf-8") as out:
            try:
                out.writelines(lines(file))
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}: not UTF-8: {error}") from None
        return {}

    cache_folder.ensure(folder, settings, build, f"preparing {name} in {folder}")
    return JsonLines([folder / "records.jsonl"], name)


def _objects(
    file: TextIO, path: Any, keep: Callable[[dict[str, Any]], bool] | None
) -> Iterator[str]:
    for number, value in enumerate(array_elements(file, os.fspath(path))):
        if not isinstance(value, dict):
            raise ValueError(f"{os.fspath(path)}: element {number} is no object: {value!r:.60}")
        if keep is None or keep(value):
            yield json.dumps(value) + "\n"


def _lines(path: Path) -> tuple[np.ndarray, str]:
    """Returns (first byte, last byte, line number) of each line with content, and the SHA-256."""
    digest, start = hashlib.sha256(), 0
    places: list[tuple[int, int, int]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if line.strip():
                places.append((start, start + len(line), number))
            start += len(line)
    return np.asarray(places, np.int64).reshape(-1, 3), digest.hexdigest()
