"""Reads the zip files of torch.save and torch.jit.save without PyTorch, running nothing of them."""

from __future__ import annotations

import os
import pathlib

import ml_dtypes
import numpy as np

from jaxmodels.weights import torch_pickle
from jaxmodels.weights.tensor_file import (
    Entry,
    TensorFile,
    WeightsError,
    native_order,
    view_bytes,
)
from jaxmodels.weights.zip_archive import Archive, Member, open_archive


def read_torch(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a file of torch.save (zip format, PyTorch 1.6 and later) or of torch.jit.save.

    Tensors only: names of nested dicts are joined with dots, other values are left out. Values are
    read lazily as strided views of the memory-mapped file.

    Of a TorchScript program (OpenAI's CLIP archives) these are the parameters and buffers of its
    modules, by the names of its `state_dict()`. Its code is not even opened; as only the code tells
    a buffer from a tensor that a module keeps as a plain attribute, those are listed too.

    Raises:
      WeightsError: not such a file, a damaged one, or one that holds more than tensors and plain
        containers (and modules, in a TorchScript program).
    """
    path = pathlib.Path(path)
    try:
        archive = open_archive(path)
        members, root = archive.members, _root(archive)
        big_endian = _is_big_endian(archive, members.get(f"{root}/byteorder"))
        # TorchScript's mark: torch.save writes no constants.
        script = f"{root}/constants.pkl" in members
        parse = torch_pickle.parse_module if script else torch_pickle.parse
        entries = {}
        for name, tensor in parse(_content(archive, members[f"{root}/data.pkl"])).items():
            member = members.get(f"{root}/data/{tensor.storage.key}")
            entries[name] = _entry(archive, tensor, member, big_endian)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return TensorFile(str(path), entries)


def _content(archive: Archive, member: Member) -> bytes | bytearray:
    if member.size > torch_pickle.MAX_PICKLE_BYTES:
        raise WeightsError(f"{member.name} has {member.size} bytes: more than the limit.")
    _require_plain(member)
    return archive.content(member)


def _require_plain(member: Member) -> None:
    # Of the members that are read only: the code of a TorchScript program is compressed.
    if not member.plain:
        raise WeightsError(
            f"the zip member {member.name!r} is compressed ({member.stored} bytes for "
            f"{member.size}); PyTorch stores plainly: refused."
        )


def _root(archive: Archive) -> str:
    """Returns the folder inside the zip that holds data.pkl."""
    paths = [name.split("/") for name in archive.members]
    roots = [path[0] for path in paths if path[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise WeightsError(
            f"a zip file, but not a checkpoint of torch.save ({len(roots)} data.pkl in it). "
            "Accepted zip files: torch.save's .pt/.pth/.bin, torch.jit.save's, and NumPy's .npz."
        )
    return roots[0]


def _is_big_endian(archive: Archive, member: Member | None) -> bool:
    # Absent before PyTorch 2.1; those files were written on little-endian machines.
    order = _content(archive, member) if member else b"little"
    if order not in (b"little", b"big"):
        raise WeightsError(f"the byte order is {bytes(order[:20])!r}, not little or big.")
    return order == b"big"


def _entry(
    archive: Archive, tensor: torch_pickle.TensorRef, member: Member | None, big_endian: bool
) -> Entry:
    """Checks the storage of one tensor against its zip member and returns its lazy entry."""
    storage = tensor.storage
    dtype = np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)
    wanted = storage.numel * dtype.itemsize
    if member is None or member.size != wanted:
        found = "absent" if member is None else f"{member.size} bytes"
        raise WeightsError(f"storage {storage.key} should have {wanted} bytes and is {found}.")
    _require_plain(member)

    def read() -> np.ndarray:
        strides = tuple(n * dtype.itemsize for n in tensor.strides)
        content, offset = archive.view(member), tensor.offset * dtype.itemsize
        array = view_bytes(content, tensor.shape, dtype, offset, strides)
        return native_order(array, big_endian)

    return Entry(tensor.shape, dtype, read)
