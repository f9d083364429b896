"""A bucket in memory behind gs:// paths, that answers with errors when told to."""

import collections
from collections.abc import Iterator

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class HttpError(Exception):
    """As gcsfs raises it: not an OSError."""

    def __init__(self, code: int, message: str = "backend error"):
        super().__init__(f"{message}, {code}")
        self.code = code


class Cloud(MemoryFileSystem):
    """Holds the bucket `here`; paths carry no scheme, folders exist by having content."""

    protocol = ("gcs", "gs")
    cachable = False
    store: dict = {}
    pseudo_dirs: list = [""]
    failures: collections.deque = collections.deque()  # raised by the next writes, one each
    always: Exception | None = None  # raised by every write
    denied: set = set()  # operations answered with 403
    uploads: list = []  # paths, in order

    @classmethod
    def _strip_protocol(cls, path):
        for prefix in ("gs://", "gcs://"):
            path = path.removeprefix(prefix)
        return "/" + path.strip("/") if path.strip("/") else ""

    def _open(self, path, mode="rb", **kwargs):
        path = self._strip_protocol(path)
        if not path.startswith("/here/") and path != "/here":
            raise FileNotFoundError(f"b/{path.split('/')[1]}/o")
        if "r" not in mode:
            self._refuse("write", path)
            if self.always is not None:
                raise self.always
            if self.failures:
                raise self.failures.popleft()
            self.uploads.append(path)
        return super()._open(path, mode, **kwargs)

    def makedirs(self, path, exist_ok=False):
        self._refuse("mkdir", path)

    def ls(self, path, detail=True, **kwargs):
        self._refuse("list", path)
        return super().ls(path, detail, **kwargs)

    def _refuse(self, what, path):
        if what in self.denied:
            raise OSError(f"Forbidden: {path}\nthe account does not have storage.{what} access")


@pytest.fixture
def cloud() -> Iterator[type[Cloud]]:
    """An empty bucket at gs://here that works."""
    fsspec.register_implementation("gcs", Cloud, clobber=True)
    Cloud.store.clear()
    Cloud.pseudo_dirs[:] = [""]
    Cloud.failures.clear()
    Cloud.denied.clear()
    Cloud.uploads.clear()
    Cloud.always = None
    yield Cloud
    Cloud.store.clear()
