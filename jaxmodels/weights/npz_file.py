"""Reads NumPy's .npz files, such as the ViT weights of big_vision, without NumPy's own loader.

`np.load` believes the sizes that a file states; here every one of them is compared with the file
before memory is taken for it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import struct
import zlib

import ml_dtypes
import numpy as np

from jaxmodels.weights.tensor_file import (
    Entry,
    TensorFile,
    WeightsError,
    native_order,
    view_bytes,
)
from jaxmodels.weights.zip_archive import Archive, Member, open_archive

# The longest header that NumPy itself believes, and the magic and length before it.
_MAX_HEADER = 10_000
_PREFIX = 12
# Compressed members may state this much together, and so many times the size of the file. Weights
# shrink by a few per cent; whole tables of zeros are what the allowance is for.
_FREE_BYTES = 64 * 2**20
_MAX_RATIO = 100

# Only what a header of plain numbers needs: nothing is evaluated.
_HEADER = re.compile(
    rb"\{'descr': (?P<descr>'[^']{1,20}'|\[.*\]), 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,19}L?, ?)*(?:\d{1,19}L?)?),?\),? ?\}[ \x00]*\n?"
)
_DTYPES = {
    "b1": np.dtype(np.bool_),
    "f2": np.dtype(np.float16),
    "f4": np.dtype(np.float32),
    "f8": np.dtype(np.float64),
    # NumPy has no bfloat16: JAX programs that save one leave two bytes of no known type.
    "V2": np.dtype(ml_dtypes.bfloat16),
} | {f"{kind}{n}": np.dtype(f"{kind}{n}") for kind in "iu" for n in (1, 2, 4, 8)}


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the header of one array promises; `start` is the position of its first value."""

    shape: tuple[int, ...]
    dtype: np.dtype
    big_endian: bool
    fortran: bool
    start: int


def read_npz(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a .npz file (np.savez, np.savez_compressed); names keep their slashes.

    Numbers and bools in either byte order, C or Fortran order; two bytes of no type (`V2`) are
    bfloat16. Stored arrays are views of the memory-mapped file, compressed ones are inflated at
    each access; both are compared with their check sum then.

    Raises:
      WeightsError: not such a file, a damaged one, one with arrays of objects (pickles: never
        loaded), text or records, or one that inflates to far more than weights could.
    """
    path = pathlib.Path(path)
    try:
        archive = open_archive(path)
        _check_sizes(archive)
        entries = {}
        for member in archive.members.values():
            if not member.name.endswith(".npy"):
                raise WeightsError(f"the zip member {member.name!r} is no .npy array.")
            entries[member.name.removesuffix(".npy")] = _entry(archive, member)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return TensorFile(str(path), entries)


def _check_sizes(archive: Archive) -> None:
    packed = sum(member.size for member in archive.members.values() if not member.plain)
    limit = _FREE_BYTES + _MAX_RATIO * archive.data.size
    if packed > limit:
        raise WeightsError(
            f"its compressed arrays claim {packed} bytes, the file has {archive.data.size}: more "
            f"than weights shrink (limit {limit}): refused. If you trust the file, save it again "
            "with np.savez."
        )


def _entry(archive: Archive, member: Member) -> Entry:
    try:
        header = _parse(bytes(archive.content(member, _PREFIX + _MAX_HEADER)))
        wanted = header.start + math.prod(header.shape) * header.dtype.itemsize
        if wanted != member.size:
            raise WeightsError(
                f"{header.dtype} {header.shape} should take {wanted} bytes with its header; the "
                f"member has {member.size}."
            )
    except WeightsError as error:
        raise WeightsError(f"array {member.name!r}: {error}") from None
    return Entry(header.shape, header.dtype, _Reader(archive, member, header))


class _Reader:
    """Reads one array; the check sum of one that lies in the file as it is, the first time."""

    def __init__(self, archive: Archive, member: Member, header: _Header) -> None:
        self.archive, self.member, self.header = archive, member, header
        self.checked = False

    def __call__(self) -> np.ndarray:
        content = self.archive.view(self.member)
        if not self.member.plain:
            content = np.frombuffer(self.archive.content(self.member), np.uint8)
            content.flags.writeable = False
        if not (self.checked and self.member.plain):
            if zlib.crc32(content) != self.member.crc:
                raise WeightsError(f"array {self.member.name!r}: wrong check sum: damaged.")
            self.checked = True
        return _array(content, self.header)


def _array(content: np.ndarray, header: _Header) -> np.ndarray:
    strides = None
    if header.fortran:
        steps = [math.prod(header.shape[:axis]) for axis in range(len(header.shape))]
        strides = tuple(step * header.dtype.itemsize for step in steps)
    array = view_bytes(content, header.shape, header.dtype, header.start, strides)
    return native_order(array, header.big_endian)


def _parse(content: bytes) -> _Header:
    """Reads the header at the begin of a .npy array."""
    if content[:6] != b"\x93NUMPY" or content[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise WeightsError(f"no .npy array of version 1 or 2 (first bytes {content[:8]!r}).")
    # Version 2 has four bytes for the length, for the many fields of a record type.
    form = struct.Struct("<H" if content[6] == 1 else "<I")
    first = 8 + form.size
    if len(content) < first:
        raise WeightsError("its header is cut.")
    start = first + form.unpack(content[8:first])[0]
    text = content[first:start]
    found = _HEADER.fullmatch(text)
    if start > len(content) or found is None:
        raise WeightsError(f"its header is cut or not one of NumPy's: {text[:80]!r}.")
    shape = tuple(int(size.rstrip(b"L")) for size in re.findall(rb"\d+L?", found["shape"]))
    descr = found["descr"].decode("latin-1")
    if len(shape) > 32 or any(size >= 2**62 for size in shape):
        raise WeightsError(f"no array can have the shape {shape}.")
    order, kind = descr[1], descr[2:-1]
    if order not in "<>|=" or kind not in _DTYPES:
        what = "Python objects, a pickle that could run code" if kind.startswith("O") else descr
        raise WeightsError(
            f"it holds {what[:60]}: refused. Accepted: bools, whole numbers and floats."
        )
    return _Header(shape, _DTYPES[kind], order == ">", found["fortran"] == b"True", start)
