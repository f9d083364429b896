"""What every reader returns: named tensors whose values are read one at a time, on request."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class WeightsError(ValueError):
    """A weights file, or a comparison of one with a model, that is not as it must be.

    Attributes:
      problems: every single finding, one line each; the message holds all of them.
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        """Joins `summary` and all `problems` into one message."""
        self.problems = tuple(problems)
        super().__init__("\n  ".join([summary, *self.problems]))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: what its header promises, and how to get the values.

    Attributes:
      shape: the tensor's shape.
      dtype: its NumPy dtype in this machine's byte order (bfloat16 and float8 from ml_dtypes).
      read: returns the values; called at each access, nothing is cached.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class TensorFile(Mapping[str, np.ndarray]):
    """Named tensors of one file (or of a set of shards), read lazily.

    A mapping from name to array. `shape` and `dtype` answer from the header, without touching the
    values. Arrays are read-only views of the memory-mapped file where that is possible: copy them
    to keep them after the file is gone.
    """

    def __init__(
        self, origin: str, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Args: origin: where the tensors come from, for messages; metadata: free text pairs."""
        self.origin = origin
        self.metadata = dict(metadata or {})
        # What a model folder's config.json says; `read` fills it in.
        self.config: dict[str, Any] = {}
        # The file itself, or an index and its shards.
        self.paths: tuple[pathlib.Path, ...] = ()
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the values of tensor `name`; KeyError where there is none."""
        return self._entries[name].read()

    def __contains__(self, name: object) -> bool:
        """Tells whether a tensor has this name, without reading it."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names, in the file's order."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of tensor `name`, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of tensor `name`, without reading it."""
        return self._entries[name].dtype

    def entry(self, name: str) -> Entry:
        """Returns the header entry of tensor `name`."""
        return self._entries[name]

    def under(self, prefix: str) -> TensorFile:
        """Returns the tensors whose name starts with `prefix`, which is cut off.

        A training checkpoint such as `{"state_dict": {...}, "epoch": 3}` holds its weights under
        `"state_dict."`; one written by a data-parallel wrapper under `"module."`.
        """
        inner = {
            name[len(prefix) :]: entry
            for name, entry in self._entries.items()
            if name.startswith(prefix)
        }
        part = TensorFile(f"{self.origin} under {prefix!r}", inner, self.metadata)
        part.config, part.paths = self.config, self.paths
        return part


def as_tensor_file(tensors: Mapping[str, Any]) -> TensorFile:
    """Returns `tensors` itself if it is a TensorFile, else its arrays behind the same interface."""
    if isinstance(tensors, TensorFile):
        return tensors

    def entry(value: Any) -> Entry:
        return Entry(tuple(np.shape(value)), np.dtype(value.dtype), lambda: np.asarray(value))

    return TensorFile("the given tensors", {name: entry(v) for name, v in tensors.items()})


def view_bytes(
    data: np.ndarray,
    shape: tuple[int, ...],
    dtype: np.dtype,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Returns a tensor inside `data` without copying.

    Args:
      data: bytes, uint8 [n], little-endian content.
      shape: shape of the tensor.
      dtype: its dtype.
      offset: position of its first element, in bytes.
      strides: distance between neighbours of each axis, in bytes; None: C order.

    Raises:
      WeightsError: it does not fit into `data`, or a bool is neither 0 nor 1.
    """
    is_bool = dtype == np.bool_
    kind = np.dtype(np.uint8) if is_bool else dtype
    try:
        if 0 in shape:
            return np.zeros(shape, dtype)
        array = np.ndarray(shape, kind, buffer=data, offset=offset, strides=strides)
    except (ValueError, TypeError, OverflowError) as error:
        raise WeightsError(f"a {dtype} tensor of shape {shape} does not fit: {error}") from None
    if not is_bool:
        return array
    if array.max() > 1:
        raise WeightsError(f"a bool tensor of shape {shape} holds bytes other than 0 and 1.")
    return array.view(np.bool_)


def native_order(array: np.ndarray, big_endian: bool) -> np.ndarray:
    """Returns an array read as little-endian with its bytes turned around, if they were not that.

    Args:
      array: real numbers; its dtype is the wanted one.
      big_endian: how the bytes lie; False returns `array` itself.
    """
    if not big_endian or array.dtype.itemsize == 1:
        return array
    # Through integers: byteswap does not know bfloat16. The copy is contiguous, scalars included.
    return np.array(array, order="C").view(f"u{array.dtype.itemsize}").byteswap().view(array.dtype)
