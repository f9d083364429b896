"""The folder of a run is tried out at the start, and a storage that is busy is tried again."""

import errno
import os
import sys

import pytest
from etils import epath

from tests.train.cloud import HttpError, cloud  # noqa: F401  (a fixture)
from train import storage
from train.errors import UsageError


@pytest.mark.parametrize(
    ("path", "remote"),
    [("gs://b/run", True), ("s3://b/run", True), ("/tmp/run", False), ("run", False)],
)
def test_buckets_are_told_from_disks(path, remote):
    assert storage.is_remote(path) is remote
    assert storage.is_remote(epath.Path(path)) is remote


def test_paths_of_buckets_are_absolute_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(storage.absolute("gs://b/run")) == "gs://b/run"
    assert storage.absolute("run") == epath.Path(os.getcwd()) / "run"


@pytest.mark.parametrize(
    ("path", "said"),
    [("ftp://host/run", "accepted are local paths and gs://"), ("gs://", "names no bucket")],
)
def test_paths_that_lead_nowhere_are_refused(path, said):
    with pytest.raises(UsageError, match=said):
        storage.probe(path)


def test_a_good_folder_is_made_and_left_empty(tmp_path, cloud):  # noqa: F811
    storage.probe(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    storage.probe("gs://here/run")
    assert cloud.store == {} and len(cloud.uploads) == 1


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=f"--workdir={path} cannot be used: .*file"):
            storage.probe(path)


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    class Absent:
        def __init__(self):
            raise ImportError("Please install s3fs to access S3")

    fsspec.register_implementation("s3", Absent, clobber=True)
    with pytest.raises(UsageError, match="s3:// needs the package s3fs: pip install s3fs"):
        storage.probe("s3://bucket/run")


@pytest.mark.parametrize(
    ("error", "status", "busy"),
    [
        (HttpError(503), 503, True),
        (HttpError(429), 429, True),
        (HttpError(400), 400, False),
        (ConnectionResetError("reset"), 503, True),
        (TimeoutError(), 503, True),
        (OSError("Forbidden: b/o\nno"), 403, False),
        (PermissionError(errno.EACCES, "no"), 403, False),
        (FileNotFoundError("b"), 404, False),
        (OSError(errno.ESTALE, "Stale file handle"), None, True),
        (OSError(errno.ENOSPC, "No space left on device"), None, False),
        (ValueError("x"), None, False),
    ],
)
def test_errors_are_understood_by_what_they_say(error, status, busy):
    assert storage.status(error) == status and storage.is_busy(error) is busy


def test_what_caused_an_error_counts_too():
    try:
        raise RuntimeError("wrapped") from HttpError(503)
    except RuntimeError as error:
        assert storage.is_busy(error)


def test_a_botocore_error_is_understood():
    error = RuntimeError("SlowDown")
    error.response = {"ResponseMetadata": {"HTTPStatusCode": 503}}
    assert storage.is_busy(error)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write(path, "first")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write(path, "second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_busy_bucket_is_written_to_again(cloud, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    cloud.failures.extend([HttpError(503), HttpError(429)])
    storage.write("gs://here/run/file", "text")
    assert epath.Path("gs://here/run/file").read_text() == "text"
    assert capsys.readouterr().out.count("storage is busy") == 2


def test_storage_needs_no_client_of_a_cloud():
    assert "gcsfs" not in sys.modules
