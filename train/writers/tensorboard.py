"""Event files for TensorBoard. tensorboardX gives the formats; the writing is ours.

Its own writer hands events to a thread. When that meets a full disk it dies, the queue to it fills,
and training waits for it for ever. Here a failing write is an OSError where it happens.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
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
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in values.items()]
        self._put(step=step, summary=Summary(value=points))

    def flush(self) -> None:
        """Makes the points so far outlive a crash of the machine, at once or soon."""
        self._file.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()

    def _put(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.append(_framed(Event(wall_time=time.time(), **fields).SerializeToString()))


def _framed(data: bytes) -> bytes:
    """A record of the TFRecord format: length, data, and the checksum of each."""
    from tensorboardX.record_writer import masked_crc32c

    head = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (head, data)]
    return head + checks[0] + data + checks[1]


def _session_start() -> Any:
    from tensorboardX.proto.event_pb2 import SessionLog

    return SessionLog(status=SessionLog.START)


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
