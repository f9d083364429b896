"""Zip checkpoints made by hand, whole or damaged, for the tests of the readers."""

import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxmodels import weights

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIX = np.arange(6, dtype=np.float32).tobytes()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, numel=6, key="0", kind="torch\nFloatStorage"):
    """The pickle instructions of one tensor, as torch.save writes them."""
    storage = b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(numel) + b"tQ" + number(offset)
        + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def named(value: bytes, name: str = "w") -> bytes:
    return b"\x80\x02}" + text(name) + value + b"s."


def archive(path, data_pkl: bytes, storage: bytes = SIX, *, compression=0, extra=()):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in [("m/data.pkl", data_pkl), ("m/data/0", storage), *extra]:
            file.writestr(name, content)
    return path


class Payload:
    """Would create a file if anything ran it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)


def opened(path: pathlib.Path, read: Callable = weights.read) -> dict[str, np.ndarray] | None:
    """All tensors of a file; None where it is refused as it should be."""
    try:
        return dict(read(path))
    except weights.WeightsError:
        return None


def damaged(path: pathlib.Path, flips: list[tuple[int, int]]) -> Iterator[None]:
    """Overwrites bytes of a file, then also cuts it; yields after each."""
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    for end in (len(content), flips[0][0] % len(content)):
        path.write_bytes(content[:end])
        yield
