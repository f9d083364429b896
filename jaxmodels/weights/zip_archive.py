"""Finds the members of a zip file without extracting any; what both zip readers stand on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from jaxmodels.weights.tensor_file import WeightsError

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CHUNK = 2**16


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of a zip file: where its bytes lie, and what the directory says about them.

    Attributes:
      name: path inside the zip; checked to be plain and relative.
      start: position of its first byte in the file.
      stored: number of bytes in the file.
      size: number of bytes of its content.
      method: zip's number of the compression; `zipfile.ZIP_STORED` where there is none.
      crc: CRC-32 of the content; a torch.save that was told so writes no true one.
    """

    name: str
    start: int
    stored: int
    size: int
    method: int
    crc: int

    @property
    def plain(self) -> bool:
        """Whether the content lies in the file as it is."""
        return self.method == zipfile.ZIP_STORED and self.stored == self.size


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip file, memory-mapped: what `open_archive` returns.

    Attributes:
      data: the whole file, uint8 [bytes].
      members: {name: member}, in the order of the directory.
    """

    data: np.ndarray
    members: Mapping[str, Member]

    def view(self, member: Member) -> np.ndarray:
        """Returns the bytes of a member as they lie in the file, uint8 [stored], not copied."""
        return np.asarray(self.data)[member.start : member.start + member.stored]

    def content(self, member: Member, limit: int | None = None) -> bytes | bytearray:
        """Returns the content of a member, or its first `limit` bytes; never makes more than that.

        Raises:
          WeightsError: compressed in another way than deflate, damaged, or not of its size.
        """
        if member.plain:
            return bytes(self.view(member)[:limit])
        if member.method != zipfile.ZIP_DEFLATED:
            raise WeightsError(
                f"the zip member {member.name!r} is compressed by method {member.method}; "
                "accepted: none and deflate."
            )
        whole = limit is None or limit >= member.size
        # One byte more than promised is enough to tell that there are more.
        made = _inflate(self.view(member), member, member.size + 1 if whole else limit)
        if whole and len(made) != member.size:
            raise WeightsError(
                f"the zip member {member.name!r} should inflate to {member.size} bytes and does "
                "not: damaged, or made to exhaust memory."
            )
        return made


def _inflate(found: np.ndarray, member: Member, wanted: int) -> bytearray:
    machine, made = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    try:
        for begin in range(0, member.stored, _CHUNK):
            rest = bytes(found[begin : begin + _CHUNK])
            while rest and len(made) < wanted:
                made += machine.decompress(rest, min(_CHUNK, wanted - len(made)))
                rest = machine.unconsumed_tail
            if machine.eof or len(made) >= wanted:
                break
    except zlib.error as error:
        raise WeightsError(f"the zip member {member.name!r} is damaged: {error}") from None
    return made


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """Opens a zip file and checks the place and the name of every member; reads no content.

    Raises:
      WeightsError: cut or damaged; a member's name is not a plain relative path or occurs twice; a
        member is a link, is encrypted, or shares bytes with another.
    """
    path = pathlib.Path(path)
    if not path.stat().st_size:
        raise WeightsError("not a readable zip file: it is empty.")
    data = np.memmap(path, np.uint8, "r")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # zipfile lets several of these through for a damaged directory.
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
        raise WeightsError(f"not a readable zip file (cut or damaged): {error}") from None
    members: dict[str, Member] = {}
    for info in infos:
        name = info.orig_filename
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in name:
            raise WeightsError(f"the zip member name {name!r} is not a plain relative path.")
        if name in members:
            raise WeightsError(f"the zip member {name!r} occurs twice.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise WeightsError(f"the zip member {name!r} is a symbolic link.")
        members[name] = _locate(data, info)
    # Many members that are the same few bytes: how a small file can stand for a huge one.
    places = sorted((m.start, m.start + m.stored, m.name) for m in members.values())
    for (_, end, first), (start, _, second) in itertools.pairwise(places):
        if end > start:
            raise WeightsError(f"the zip members {first!r} and {second!r} share bytes: refused.")
    return Archive(data, members)


def _locate(data: np.ndarray, info: zipfile.ZipInfo) -> Member:
    begin = info.header_offset
    header = bytes(data[begin : begin + _LOCAL_HEADER.size]) if begin >= 0 else b""
    if len(header) < _LOCAL_HEADER.size:
        raise WeightsError(f"the zip member {info.orig_filename!r} lies outside the file.")
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name_start = begin + _LOCAL_HEADER.size
    start = name_start + name_length + extra_length
    raw_name = bytes(data[name_start : name_start + name_length])
    encoding = "utf-8" if flags & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or flags & 1 or method != info.compress_type:
        raise WeightsError(f"the zip member {info.orig_filename!r} is damaged or encrypted.")
    if raw_name.decode(encoding, "replace") != info.orig_filename:
        raise WeightsError(f"the zip member {info.orig_filename!r} has another name in its header.")
    if start + info.compress_size > data.size:
        raise WeightsError(f"the zip member {info.orig_filename!r} lies outside the file: cut?")
    return Member(info.orig_filename, start, info.compress_size, info.file_size, method, info.CRC)
