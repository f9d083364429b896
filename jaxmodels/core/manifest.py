"""Proof that a stored folder is whole: a SHA-256 of every file, in a manifest written last.

Storage returns wrong bytes now and then, and TensorStore decodes some of them into wrong numbers
without complaint. A folder counts only once its manifest is there, and only while it agrees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # installed with orbax, not with the bare library
    from etils import epath

NAME = "manifest.json"
FORMAT = 1
_PARTIAL = f"{NAME}.partial"
_CHUNK = 4 << 20
_THREADS = 8
_SPECIFICATION = re.compile(r" ?\[(tensorstore_\w+|source locations)=.*")  # pages of JSON
_HEAD, _TAIL = 100, 200  # characters of a long error


class Damaged(Exception):
    """A folder is not what was written; the message is one line and names the file."""


class NewerFormat(ValueError):
    """A newer version of this library wrote the manifest; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a whole folder holds.

    Attributes:
      facts: JSON values of the writer.
      files: {path in the folder: (bytes, SHA-256)}.
      digest: SHA-256 of the above; names this content among all others.
    """

    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]
    digest: str


def write(folder: epath.Path, facts: Mapping[str, Any]) -> Manifest:
    """Hashes every file in `folder` and writes its manifest, atomically.

    Raises:
      OSError: the storage failed; there is no manifest then.
    """
    names = sorted(name for name in _names(folder) if name not in (NAME, _PARTIAL))
    hashes = _threaded(lambda name: _hash(folder / name), names)
    body = {"facts": dict(facts), "files": dict(zip(names, hashes, strict=True))}
    digest = _digest(body)
    text = json.dumps({"format": FORMAT, "digest": digest} | body)
    partial = folder / _PARTIAL
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(OSError, AttributeError):  # remote files have no descriptor
            os.fsync(file.fileno())
    partial.replace(folder / NAME)
    return Manifest(body["facts"], body["files"], digest)


def read(folder: epath.Path) -> Manifest:
    """Returns the manifest of `folder`, which nothing has altered.

    Raises:
      Damaged: there is none, or it is not as written.
      NewerFormat: a newer version of this library wrote it.
    """
    path = folder / NAME
    try:
        record = json.loads(_readable(path.read_text, NAME))
        version, body = record["format"], {key: record[key] for key in ("facts", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME} is not a manifest ({one_line(error)})") from error
    if version != FORMAT:
        raise NewerFormat(f"{path} has format {version}; this version of jaxmodels reads {FORMAT}")
    if _digest(body) != record.get("digest"):
        raise Damaged(f"{NAME} differs from what was written (SHA-256)")
    files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
    return Manifest(body["facts"], files, record["digest"])


def verify(folder: epath.Path, manifest: Manifest, under: tuple[str, ...] = ("",)) -> None:
    """Compares the files of `folder` whose names start as one of `under` with the manifest.

    Raises:
      Damaged: a file is absent, cut or altered; the first is named, the others counted.
      OSError: the storage cannot be read; says nothing about the files.
    """
    wanted = {n: entry for n, entry in manifest.files.items() if n.startswith(under)}
    for name, (size, _) in wanted.items():
        found = _readable((folder / name).stat, name).length
        if found != size:
            raise Damaged(f"{name} has {found:,} bytes of {size:,}")
    names = list(wanted)
    found = _threaded(lambda name: _readable(lambda: _hash(folder / name), name), names)
    wrong = [name for name, entry in zip(names, found, strict=True) if entry != wanted[name]]
    if wrong:
        more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
        raise Damaged(f"{wrong[0]} differs from what was written (SHA-256){more}")


def one_line(error: BaseException) -> str:
    """Returns the type and the text of an error without line breaks; long ones lose the middle."""
    text = _SPECIFICATION.sub("", " ".join(str(error).split()))
    text = text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _readable(read_: Callable[[], Any], name: str) -> Any:
    """Calls `read_`; what is gone or lies on a bad sector is damage, other errors pass."""
    try:
        return read_()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{name} is missing") from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Damaged(f"{name} cannot be read ({one_line(error)})") from error


def _names(folder: epath.Path, prefix: str = "") -> list[str]:
    """The paths of all files under `folder`, relative to it."""
    found = []
    for path in folder.iterdir():
        name = prefix + path.name
        found += _names(path, f"{name}/") if path.is_dir() else [name]
    return found


def _hash(path: epath.Path) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            digest.update(chunk)
    return size, digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _threaded(function: Callable[[str], Any], names: list[str]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS, "checkpoint-digest") as pool:
        return list(pool.map(function, names))
