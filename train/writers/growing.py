"""A file that only grows: appended to on a disk; in a bucket, uploaded whole every half minute."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from etils import epath

from train import storage
from train.storage import Say

UPLOAD_EVERY = 30.0  # seconds
_LAST_UPLOAD = 60.0  # seconds that closing waits for the last upload


class GrowingFile(Protocol):
    """What the files of both kinds of storage offer."""

    def append(self, data: bytes) -> None:
        """Adds `data` at the end; after an OSError it is kept and goes first next time."""

    def flush(self) -> None:
        """Makes what was appended outlive this machine, at once or soon."""

    def close(self) -> None:
        """Writes what is still kept."""


def open_growing(path: epath.PathLike, content: bytes = b"", say: Say = print) -> GrowingFile:
    """Opens a file that holds `content` now.

    Args:
      path: local, or in a bucket.
      content: what it holds already; a file in a bucket is kept in memory from then on.
      say: takes the one line of a failing upload.
    """
    return _Uploaded(path, content, say) if storage.is_remote(path) else _Local(path)


class _Local:
    """On a disk. A line that only half fitted is taken back, so that the file stays readable."""

    def __init__(self, path: epath.PathLike):
        self._path = os.fspath(path)
        self._waiting = bytearray()

    def append(self, data: bytes) -> None:
        self._waiting += data
        # Opened anew each time: a disk that was full or a mount that went away may be back.
        with open(self._path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                done = 0
                while done < len(self._waiting):
                    done += file.write(self._waiting[done:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        self._waiting.clear()

    def flush(self) -> None:
        if os.path.exists(self._path):
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._waiting:
            self.append(b"")


class _Uploaded:
    """In a bucket, by a thread of its own: a step never waits for an upload."""

    def __init__(self, path: epath.PathLike, content: bytes, say: Say):
        self._parts = [content] if content else []
        self._uploader = Uploader(path, lambda: b"".join(list(self._parts)), say)

    def append(self, data: bytes) -> None:
        self._parts.append(data)
        self._uploader.changed()

    def flush(self) -> None:
        self._uploader.changed(now=True)

    def close(self) -> None:
        self._uploader.close()


class Uploader:
    """Keeps an object of a bucket up to date with a content that changes in memory."""

    def __init__(
        self,
        path: epath.PathLike,
        content: Callable[[], bytes],
        say: Say = print,
        every: float = UPLOAD_EVERY,
    ):
        """Starts the thread; nothing is uploaded before the first `changed`.

        Args:
          path: of the object.
          content: returns what it should hold; called by the thread.
          say: takes one line when uploads start to fail, and one when the last one failed.
          every: least seconds between uploads.
        """
        self._path, self._content, self._say, self._every = epath.Path(path), content, say, every
        self._state = threading.Condition()
        self._dirty = self._now = self._closing = self._failing = False
        self._thread = threading.Thread(target=self._run, name=f"upload {path}", daemon=True)
        self._thread.start()

    def changed(self, now: bool = False) -> None:
        """Asks for an upload: when the interval is over, or now. Returns at once."""
        with self._state:
            self._dirty = True
            self._now = self._now or now
            self._state.notify()

    def close(self) -> None:
        """Uploads what is left and ends the thread; gives up after a minute."""
        with self._state:
            self._closing = True
            self._state.notify()
        self._thread.join(_LAST_UPLOAD)
        if self._dirty:
            self._say(f"warning: {self._path}: its end could not be uploaded and is lost")

    def _run(self) -> None:
        last = -self._every
        while True:
            with self._state:
                self._state.wait_for(lambda: self._dirty or self._closing)
                left = last + self._every - time.monotonic()
                self._state.wait_for(lambda: self._now or self._closing, max(left, 0.0))
                closing, wanted = self._closing, self._dirty
                self._dirty = self._now = False
            if wanted:
                last = time.monotonic()
                self._upload(closing)
            if closing:
                return

    def _upload(self, closing: bool) -> None:
        try:
            content = self._content()
            storage.retry(lambda: self._path.write_bytes(content), self._quiet, 4 if closing else 2)
            self._failing = False
        except Exception as error:
            self._dirty = True  # tried again when the interval is over
            if not self._failing:
                self._say(
                    f"warning: {self._path} cannot be uploaded ({storage.describe(error)}); "
                    f"training goes on and tries again every {self._every:.0f} s"
                )
            self._failing = True

    @staticmethod
    def _quiet(_: str) -> None:
        """Single retries in the background are counted, not said."""
