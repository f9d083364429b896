"""Files that only grow: nothing is lost to a full disk or a busy bucket but what cannot be kept."""

import os
import threading
import time

import pytest
from etils import epath

from tests.train.cloud import HttpError, cloud  # noqa: F401  (a fixture)
from train import storage
from train.writers import growing
from train.writers.growing import Uploader, open_growing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_line_that_half_fits_is_taken_back_and_comes_later(tmp_path, monkeypatch):
    path = tmp_path / "file"
    file = open_growing(path)
    file.append(b"one\n")
    room = [2]  # bytes that the disk still takes

    class Disk:
        def __init__(self, raw):
            self.raw = raw

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.raw.close()

        def __getattr__(self, name):
            return getattr(self.raw, name)

        def write(self, data):
            if not room[0]:
                raise OSError(28, "No space left on device")
            written = self.raw.write(bytes(data)[: room[0]])
            room[0] -= written
            return written

    monkeypatch.setattr(growing, "open", lambda *a, **k: Disk(open(*a, **k)), raising=False)
    for line in (b"two\n", b"three\n"):
        with pytest.raises(OSError, match="No space"):
            file.append(line)
        assert path.read_bytes() == b"one\n"
    room[0] = 1000
    file.append(b"four\n")
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    file.flush()
    file.close()


def test_what_did_not_fit_is_written_at_the_end(tmp_path):
    folder = tmp_path / "gone"
    file = open_growing(folder / "file")
    with pytest.raises(OSError):
        file.append(b"one\n")
    file.flush()
    folder.mkdir()
    file.close()
    assert (folder / "file").read_bytes() == b"one\n"


def test_a_bucket_gets_the_whole_file_now_and_then(cloud):  # noqa: F811
    path = epath.Path("gs://here/run/metrics.jsonl")
    file = open_growing(path, b"old\n")
    for i in range(100):
        file.append(b"%d\n" % i)
    until(lambda: cloud.uploads)  # the first does not wait
    file.append(b"more\n")
    file.flush()
    until(lambda: path.read_bytes().endswith(b"more\n"))
    file.append(b"last\n")
    file.close()
    lines = path.read_text().splitlines()
    assert lines == ["old", *map(str, range(100)), "more", "last"]
    assert len(cloud.uploads) <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("upload")]


def test_uploads_keep_their_distance(cloud):  # noqa: F811
    content = [b""]
    uploader = Uploader("gs://here/run/file", lambda: content[0], every=0.3)
    start = time.monotonic()
    while time.monotonic() - start < 1.0:
        content[0] += b"."
        uploader.changed()
        time.sleep(0.01)
    uploader.close()
    assert 2 <= len(cloud.uploads) <= 6
    assert epath.Path("gs://here/run/file").read_bytes() == content[0]


def test_a_bucket_that_fails_is_said_once_and_tried_again(cloud):  # noqa: F811
    said, content = [], [b"a"]
    uploader = Uploader("gs://here/run/file", lambda: content[0], said.append, every=0.02)
    cloud.always = HttpError(503)
    uploader.changed()
    until(lambda: said)
    content[0] = b"ab"
    cloud.always = None
    until(lambda: epath.Path("gs://here/run/file").exists())
    uploader.close()
    assert epath.Path("gs://here/run/file").read_bytes() == b"ab"
    assert len(said) == 1 and "cannot be uploaded (HttpError 503" in said[0]


def test_an_end_that_is_lost_is_said(cloud):  # noqa: F811
    said = []
    uploader = Uploader("gs://here/run/file", lambda: b"a", said.append)
    cloud.always = HttpError(403, "denied")
    uploader.changed()
    uploader.close()
    assert len(said) == 2 and said[1].endswith("its end could not be uploaded and is lost")


def test_flushing_a_file_that_nobody_wrote_to_is_nothing(tmp_path):
    file = open_growing(tmp_path / "file")
    file.flush()
    file.close()
    assert os.listdir(tmp_path) == []
