"""Event files: what TensorBoard will read from them."""

import struct
import time

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from tests.train.cloud import cloud  # noqa: F401  (a fixture)
from train.writers.tensorboard import TensorBoard


def events(path):
    """The events of a file; checks every checksum."""
    data, found = epath.Path(path).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        body, check = data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", check)[0] == masked_crc32c(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def files(folder):
    return sorted(epath.Path(folder).iterdir(), key=lambda path: path.name)


def write(folder, start, *steps):
    board = TensorBoard(folder, start)
    for step in steps:
        board.write(step, "train", {"loss": step / 2, "accuracy": 0.5})
    board.flush()
    board.close()


def test_points_are_under_their_split(tmp_path):
    write(tmp_path / "tb", 0, 1, 2)
    (path,) = files(tmp_path / "tb")
    first, *points = events(path)
    assert first.file_version == "brain.Event:2"
    assert [p.step for p in points] == [1, 2]
    assert [(v.tag, v.simple_value) for v in points[1].summary.value] == [
        ("train/loss", 1.0),
        ("train/accuracy", 0.5),
    ]


def test_a_resumed_run_hides_what_comes_again(tmp_path, cloud):  # noqa: F811
    for folder in (tmp_path / "tb", epath.Path("gs://here/run/tensorboard")):
        write(folder, 0, 1, 2, 3)
        write(folder, 2, 3, 4)
        before, after = map(events, files(folder))
        assert [e.step for e in before[1:]] == [1, 2, 3]
        assert (after[1].step, after[1].session_log.status) == (3, SessionLog.START)
        assert [e.step for e in after[2:]] == [3, 4]


def test_files_sort_by_start_whatever_the_clock_says(tmp_path, monkeypatch):
    for i, now in enumerate((2e9, 1e9, 1e9, 3e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write(tmp_path, 10 * i, 10 * i + 1)
    starts = [events(path)[-1].step for path in files(tmp_path)]
    assert starts == [1, 11, 21, 31]
