"""Unpacks downloaded zip and tar files, which are input of strangers: everything is checked first.

archives.extract("clips.tar.gz", "data/clips", max_bytes=20 * 2**30)
"""

import bz2
import contextlib
import errno
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

_CHUNK = 2**20
_LONGEST_NAME, _LONGEST_PART = 1024, 255
# Bytes of a tar file between the contents of two members: headers, long names, padding.
_OVERHEAD = 2**20
_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# What the standard readers raise for damaged files.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


class ArchiveError(ValueError):
    """An archive that is damaged or holds what it may not; nothing of it is on disk."""


class _Member(NamedTuple):
    """One entry: its name as the archive has it, and what it claims to be."""

    name: str
    size: int
    is_folder: bool
    other: str | None  # "a symbolic link", "a device" ...: neither file nor folder
    open: Callable[[], Any]


def extract(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    max_bytes: int,
    max_files: int = 1_000_000,
) -> list[Path]:
    """Unpacks an archive into a new folder, which appears complete in one rename or not at all.

    Every member is checked before the first byte is written. Refused are: absolute paths, drive
    letters, "..", links and devices of any kind, names that occur twice, encrypted members, and
    more bytes or files than allowed; sizes are counted again while writing, since headers lie.

    Args:
      archive: a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz file, told by its content.
      folder: where the content goes; it must not exist yet, or be empty.
      max_bytes: of all files together, unpacked.
      max_files: files and folders in all.

    Returns:
      the files, sorted.

    Raises:
      ArchiveError: see above, or the archive is damaged or of another kind; names the member.
      ValueError: `folder` exists and is not empty.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another, or remove it")
    with _naming(archive), _members(archive) as members:
        sizes = _check(members, max_bytes, max_files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.extracting-"))
    try:
        made = work / "made"
        made.mkdir()
        with _naming(archive), _members(archive) as members:
            written = _write(members, made, sizes, max_bytes)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
        return sorted(folder / name for name in written)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """Puts the archive's name in front of every complaint about it."""
    try:
        yield
    except FileNotFoundError:
        raise ArchiveError(f"{archive}: no such file") from None
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: {error}; nothing was unpacked") from None
    except _DAMAGED as error:
        # A number means the disk, but for a seek to a place that only a damaged header can name.
        if getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise
        raise ArchiveError(
            f"{archive}: damaged, or cut ({type(error).__name__}: {error}); nothing was unpacked. "
            "Fetch it again"
        ) from error


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    """Opens an archive and gives its members in order."""
    with open(archive, "rb") as file:
        head = file.read(512)
        file.seek(0)
        if head[:2] == b"PK":
            with zipfile.ZipFile(file) as opened:
                yield _zip_members(opened)
            return
        kind = next((k for k in _COMPRESSIONS if head.startswith(k)), None)
        if kind is None and head[257:262] != b"ustar":
            raise ArchiveError("neither a zip file nor a tar file (plain, gzip, bzip2 or xz)")
        with contextlib.ExitStack() as stack:
            plain = file if kind is None else stack.enter_context(_COMPRESSIONS[kind](file))
            bounded = _Bounded(plain)
            opened = stack.enter_context(tarfile.open(fileobj=bounded, mode="r|"))
            yield _tar_members(opened, bounded)


class _Bounded:
    """A stream that gives only what was allowed: a header that is a bomb ends here."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, _OVERHEAD

    def allow(self, size: int) -> None:
        """Allows the contents of a member and all up to those of the next."""
        self._left = size + _OVERHEAD

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveError(f"a header of more than {_OVERHEAD} bytes: refused")
        return data


def _zip_members(opened: zipfile.ZipFile) -> Iterator[_Member]:
    for info in opened.infolist():
        mode = info.external_attr >> 16
        other = None
        if info.flag_bits & 1:
            other = "encrypted"
        elif stat.S_ISLNK(mode):
            other = "a symbolic link"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            other = "a device or pipe"
        # `filename` is what zipfile made of the name: cut at a NUL, for instance.
        name = info.orig_filename
        yield _Member(
            name, info.file_size, name.endswith("/"), other, lambda i=info: opened.open(i)
        )


def _tar_members(opened: tarfile.TarFile, bounded: _Bounded) -> Iterator[_Member]:
    for info in opened:
        bounded.allow(max(info.size, 0))
        other = None
        if info.issym() or info.islnk():
            other = f"a link to {info.linkname!r}"
        elif info.issparse() or not (info.isreg() or info.isdir()):
            other = "a device, pipe or sparse file"
        size = info.size if info.isreg() else 0
        yield _Member(info.name, size, info.isdir(), other, lambda i=info: opened.extractfile(i))
        opened.members.clear()  # a stream needs no memory of what it has passed


def _check(members: Iterator[_Member], max_bytes: int, max_files: int) -> dict[str, int]:
    """Returns {path: size} of the files.

    Raises:
      ArchiveError: a member may not be there, or they are too many or too large.
    """
    files: dict[str, int] = {}
    folders: set[str] = set()
    total = 0
    for count, member in enumerate(members, start=1):
        path = _checked_path(member)
        if member.other is not None:
            raise ArchiveError(f"member {member.name!r} is {member.other}: refused")
        if member.size < 0:
            raise ArchiveError(f"member {member.name!r} has a size of {member.size}: refused")
        total += member.size
        if total > max_bytes or count > max_files:
            raise ArchiveError(
                f"it unpacks to more than the {max_bytes} bytes or {max_files} files allowed "
                f"({total} bytes in {count} members up to {member.name!r})"
            )
        folders.update(str(parent) for parent in Path(path).parents)
        if member.is_folder:
            folders.add(path)
        elif path in files:
            raise ArchiveError(f"member {member.name!r} occurs twice: refused")
        else:
            files[path] = member.size
    both = sorted(files.keys() & folders)
    if both:
        raise ArchiveError(f"member {both[0]!r} is a file and a folder: refused")
    if not files:
        raise ArchiveError("there is no file in it")
    return files


def _checked_path(member: _Member) -> str:
    """Returns the member's path in plain form, such as "a/b.txt"."""
    name = member.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    absolute = name.startswith("/") or re.match(r"[A-Za-z]:", name)
    unfit = any(ord(letter) < 32 or letter == "\\" for letter in name)
    long = len(os.fsencode(name)) > _LONGEST_NAME or any(
        len(os.fsencode(part)) > _LONGEST_PART for part in parts
    )
    if absolute or unfit or long or ".." in parts or not (parts or member.is_folder):
        raise ArchiveError(
            f"the name of member {name[:200]!r} is refused: only plain relative paths are accepted"
        )
    return "/".join(parts) or "."


def _write(
    members: Iterator[_Member], root: Path, sizes: dict[str, int], max_bytes: int
) -> list[str]:
    """Writes the files under `root`, which is empty and ours alone; returns their paths."""
    left, written = max_bytes, []
    for member in members:
        path = _checked_path(member)
        if member.is_folder:
            (root / path).mkdir(parents=True, exist_ok=True)
            continue
        if member.other is not None or sizes.pop(path, None) != member.size:
            raise ArchiveError(f"member {path!r} changed while it was unpacked")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        left -= _copy(member, root / path, left)
        written.append(path)
    if sizes:
        raise ArchiveError(f"{len(sizes)} members are gone since they were checked")
    return written


def _copy(member: _Member, target: Path, left: int) -> int:
    """Writes one file; counts what really comes, whatever the header says."""
    done = 0
    with member.open() as source, open(target, "xb") as file:
        while chunk := source.read(_CHUNK):
            done += len(chunk)
            if done > min(member.size, left):
                raise ArchiveError(f"member {member.name!r} holds more than its header says")
            file.write(chunk)
    if done != member.size:
        raise ArchiveError(f"member {member.name!r} holds {done} of {member.size} bytes: cut")
    return done
