"""Event files for TensorBoard. tensorboardX gives the formats; the writing is ours.

Its own writer hands events to a thread. When that meets a full disk it dies, the queue to it fills,
and training waits for it for ever. Here a failing write is an OSError where it happens.
"""

import contextlib
import functools
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from etils import epath

from train import storage
from train.storage import Say
from train.writers.growing import open_growing

_PREFIX = "events.out.tfevents."


class TensorBoard:
    """One event file a start of the run."""

    def __init__(self, folder: epath.PathLike, step: int, say: Say = print):
        """Opens a new event file; what earlier ones hold after `step` is hidden.

        Args:
          folder: for event files, local or in a bucket; made where absent.
          step: continued from; 0 for a new run.
          say: takes the one line of a failing upload.
        """
        folder = epath.Path(folder)
        if not storage.is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
        name = f"{_PREFIX}{_next_stamp(folder):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open_growing(folder / name, b"", say)
        self._put(file_version="brain.Event:2")
        if step:
            self._put(step=step + 1, session_log=_session_start())

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds one point to the curve `split/name` of each value.

        Raises:
          OSError: the disk does not take it.
        """
        summary = _formats().Summary
        points = [summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in values.items()]
        self._put(step=step, summary=summary(value=points))

    def flush(self) -> None:
        """Makes the points so far outlive a crash of the machine, at once or soon."""
        self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()

    def _put(self, **fields: Any) -> None:
        event = _formats().Event(wall_time=time.time(), **fields)
        self._file.append(_framed(event.SerializeToString()))


@functools.cache
def _formats() -> SimpleNamespace:
    """What we take from tensorboardX: three messages and a checksum."""
    with _hidden("torch"):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c
    return SimpleNamespace(
        Event=Event, SessionLog=SessionLog, Summary=Summary, checksum=masked_crc32c
    )


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Lets the import of a module that nobody has imported yet fail inside.

    tensorboardX imports PyTorch where it is installed, which costs every start some seconds.
    """
    hides = module not in sys.modules
    if hides:
        sys.modules[module] = None  # how the import system notes an absence
    try:
        yield
    finally:
        if hides:
            del sys.modules[module]


def _framed(data: bytes) -> bytes:
    """A record of the TFRecord format: length, data, and the checksum of each."""
    head = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", _formats().checksum(part)) for part in (head, data)]
    return head + checks[0] + data + checks[1]


def _session_start() -> Any:
    log = _formats().SessionLog
    return log(status=log.START)


def _next_stamp(folder: epath.Path) -> int:
    """The time of a new file's name. TensorBoard reads files by name, so it must be the largest.

    The clock alone does not see to that: it may be set back, and another machine's may be behind.
    """
    stamps = [0]
    if folder.exists():
        for path in folder.iterdir():
            stamp = path.name.removeprefix(_PREFIX).partition(".")[0]
            if path.name.startswith(_PREFIX) and stamp.isdecimal():
                stamps.append(int(stamp))
    return max(int(time.time()), max(stamps) + 1)
