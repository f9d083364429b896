"""Reads and writes .safetensors files; every number of the header is checked before it is used."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError, view_bytes

# The format's own limit: a larger header is an attack or an accident.
MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a .safetensors file; values are read lazily from a memory map.

    Raises:
      WeightsError: the file is cut, or its header is not valid; nothing has been allocated then.
    """
    path = pathlib.Path(path)
    header, start = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: __metadata__ must map text to text.")
    size = path.stat().st_size - start
    checked = _check_entries(path, header, size)
    data = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.zeros(0, np.uint8)

    def entry(shape: tuple[int, ...], dtype: np.dtype, offset: int) -> Entry:
        return Entry(shape, dtype, lambda: view_bytes(np.asarray(data), shape, dtype, offset))

    return TensorFile(str(path), {k: entry(*place) for k, place in checked.items()}, metadata)


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Returns the parsed header and the position of the first data byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise WeightsError(f"{path}: {size} bytes are too few for a safetensors file.")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise WeightsError(
                f"{path}: its header should take {length} bytes; the file has {size - 8} after the "
                f"length field, and {MAX_HEADER_BYTES} is the limit. The file is cut or damaged: "
                "fetch it again."
            )
        text = file.read(length)
    return parse_json_object(text, f"{path}: the header"), 8 + length


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Returns a JSON object, refusing duplicate names, and anything that is not valid JSON.

    Raises:
      WeightsError: `text` is not one JSON object with distinct names; `what` names its place.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{what} must be a JSON object, not a {type(value).__name__}.")
    return value


def _check_entries(
    path: pathlib.Path, header: Mapping[str, Any], size: int
) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
    """Returns {name: (shape, dtype, offset)} after checking that they tile the data exactly."""
    problems: list[str] = []
    places: list[tuple[int, int, str]] = []
    checked = {}
    for name, info in header.items():
        found = _check_entry(info)
        if isinstance(found, str):
            problems.append(f"{name!r}: {found}")
            continue
        shape, dtype, begin, end = found
        checked[name] = (shape, dtype, begin)
        places.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(places):
        if begin != position and not problems:
            problems.append(
                f"{name!r} starts at byte {begin}; the tensor before ends at {position}"
            )
        position = end
    if position != size and not problems:
        problems.append(f"the tensors end at byte {position}, the data at {size}: cut or damaged")
    if problems:
        raise WeightsError(f"{path}: the safetensors header is not valid.", problems)
    return checked


def _check_entry(info: Any) -> tuple[tuple[int, ...], np.dtype, int, int] | str:
    """Returns (shape, dtype, begin, end) of one tensor, or what is wrong with it."""
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        return "needs exactly dtype, shape and data_offsets"
    dtype = _DTYPES.get(info["dtype"]) if isinstance(info["dtype"], str) else None
    if dtype is None:
        return f"dtype {str(info['dtype'])[:40]!r} is not one of {', '.join(_DTYPES)}"
    shape, offsets = info["shape"], info["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        return "shape and data_offsets must be lists of whole numbers >= 0 (two offsets)"
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        return f"{info['dtype']} {shape} does not take the bytes {begin} to {end}"
    return tuple(shape), dtype, begin, end


def _are_sizes(values: Any) -> bool:
    # type() and not isinstance(): JSON's true must not pass for 1.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays (NumPy or JAX) to a .safetensors file, replacing it in one step.

    Args:
      path: the file; its folder must exist.
      tensors: {name: array}.
      metadata: text pairs for the header, e.g. {"format": "pt"} for Hugging Face readers.

    Raises:
      WeightsError: a name, dtype or metadata value that the format cannot hold; nothing is
        written then.
    """
    path = pathlib.Path(path)
    metadata = dict(metadata or {})
    problems = [f"metadata {k!r} is not text" for k, v in metadata.items() if not _is_text(k, v)]
    for name, value in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            problems.append(f"{name!r} cannot name a tensor")
        elif np.dtype(value.dtype) not in _NAMES:
            problems.append(f"{name!r}: dtype {value.dtype} is not one of {', '.join(_DTYPES)}")
    if problems:
        raise WeightsError(f"{path}: not written.", problems)
    # Wide dtypes first, as the format's own writer does: every tensor is then aligned.
    order = sorted(tensors, key=lambda k: (-np.dtype(tensors[k].dtype).itemsize, k))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), [int(n) for n in np.shape(tensors[name])]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    _write(path, header, [tensors[name] for name in order])


def _is_text(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _write(path: pathlib.Path, header: Mapping[str, Any], arrays: list[Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in arrays:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        # mkstemp makes the file private; give it the permissions of an ordinary new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
