"""Reads the zip checkpoints of torch.save without PyTorch, running and extracting nothing."""

from __future__ import annotations

import os
import pathlib
import stat
import struct
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxmodels.weights import torch_pickle
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError, view_bytes

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class _Member(NamedTuple):
    """Where the bytes of a zip member lie in the file."""

    start: int
    size: int


def read_torch(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a checkpoint written by torch.save (zip format, PyTorch 1.6 and later).

    Tensors only: names of nested dicts are joined with dots, other values are left out. Values are
    read lazily as strided views of the memory-mapped file.

    Raises:
      WeightsError: not such a file, a damaged one, or one that holds more than tensors and plain
        containers.
    """
    path = pathlib.Path(path)
    data = np.memmap(path, np.uint8, "r")
    try:
        members = _members(path, data)
        root = _root(members)
        big_endian = _is_big_endian(data, members.get(f"{root}/byteorder"))
        tensors = torch_pickle.parse(_content(data, members[f"{root}/data.pkl"]))
        entries = {}
        for name, tensor in tensors.items():
            member = members.get(f"{root}/data/{tensor.storage.key}")
            entries[name] = _entry(data, tensor, member, big_endian)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return TensorFile(str(path), entries)


def _members(path: pathlib.Path, data: np.ndarray) -> dict[str, _Member]:
    """Returns where each member lies, after checking that it is stored plainly."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # zipfile lets several of these through for a damaged directory.
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
        raise WeightsError(f"not a readable zip file (cut or damaged): {error}") from None
    members: dict[str, _Member] = {}
    for info in infos:
        name = info.orig_filename
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in name:
            raise WeightsError(f"the zip member name {name!r} is not a plain relative path.")
        if name in members:
            raise WeightsError(f"the zip member {name!r} occurs twice.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise WeightsError(f"the zip member {name!r} is a symbolic link.")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise WeightsError(
                f"the zip member {name!r} is compressed ({info.compress_size} bytes for "
                f"{info.file_size}); torch.save stores plainly: refused."
            )
        members[name] = _locate(data, info)
    return members


def _locate(data: np.ndarray, info: zipfile.ZipInfo) -> _Member:
    begin = info.header_offset
    header = bytes(data[begin : begin + _LOCAL_HEADER.size]) if begin >= 0 else b""
    if len(header) < _LOCAL_HEADER.size:
        raise WeightsError(f"the zip member {info.orig_filename!r} lies outside the file.")
    signature, _, flags, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name_start = begin + _LOCAL_HEADER.size
    start = name_start + name_length + extra_length
    raw_name = bytes(data[name_start : name_start + name_length])
    encoding = "utf-8" if flags & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or flags & 1:
        raise WeightsError(f"the zip member {info.orig_filename!r} is damaged or encrypted.")
    if raw_name.decode(encoding, "replace") != info.orig_filename:
        raise WeightsError(f"the zip member {info.orig_filename!r} has another name in its header.")
    if start + info.file_size > data.size:
        raise WeightsError(f"the zip member {info.orig_filename!r} lies outside the file: cut?")
    return _Member(start, info.file_size)


def _content(data: np.ndarray, member: _Member) -> bytes:
    if member.size > torch_pickle.MAX_PICKLE_BYTES:
        raise WeightsError(f"data.pkl has {member.size} bytes: more than the limit.")
    return bytes(data[member.start : member.start + member.size])


def _root(members: dict[str, _Member]) -> str:
    """Returns the folder inside the zip that holds data.pkl."""
    roots = [name.split("/")[0] for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise WeightsError(
            f"a zip file, but not a checkpoint of torch.save ({len(roots)} data.pkl in it). "
            "Accepted: .safetensors, its .index.json, and torch.save's .pt/.pth/.bin."
        )
    root = roots[0]
    if f"{root}/constants.pkl" in members:
        raise WeightsError("a TorchScript program: save its state_dict() as safetensors.")
    return root


def _is_big_endian(data: np.ndarray, member: _Member | None) -> bool:
    # Absent before PyTorch 2.1; those files were written on little-endian machines.
    order = _content(data, member) if member else b"little"
    if order not in (b"little", b"big"):
        raise WeightsError(f"the byte order is {order[:20]!r}, not little or big.")
    return order == b"big"


def _entry(
    data: np.ndarray, tensor: torch_pickle.TensorRef, member: _Member | None, big_endian: bool
) -> Entry:
    """Checks the storage of one tensor against its zip member and returns its lazy entry."""
    storage = tensor.storage
    dtype = np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)
    wanted = storage.numel * dtype.itemsize
    if member is None or member.size != wanted:
        found = "absent" if member is None else f"{member.size} bytes"
        raise WeightsError(f"storage {storage.key} should have {wanted} bytes and is {found}.")

    def read() -> np.ndarray:
        content = np.asarray(data)[member.start : member.start + member.size]
        strides = tuple(n * dtype.itemsize for n in tensor.strides)
        array = view_bytes(content, tensor.shape, dtype, tensor.offset * dtype.itemsize, strides)
        if not big_endian or dtype.itemsize == 1:
            return array
        # Through integers: byteswap does not know bfloat16.
        return np.ascontiguousarray(array).view(f"u{dtype.itemsize}").byteswap().view(dtype)

    return Entry(tensor.shape, dtype, read)
