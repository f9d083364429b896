"""The disk or bucket that holds a run: tried out before anything is compiled, retried when busy."""

import collections
import contextlib
import errno
import os
import random
import re
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import jax
from etils import epath

from train import distributed
from train.errors import RunError, UsageError
from train.redact import redact

T = TypeVar("T")
Say = Callable[[str], None]
# What each kind of path needs besides this package.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds; doubled at each attempt
RETRIES: collections.Counter[str] = collections.Counter()  # by what was answered
_BUSY = (408, 429, 500, 502, 503, 504)
# Storage clients have exceptions of their own; importing them all to name them would be slow.
_STATUS_BY_NAME = {
    **dict.fromkeys(("DefaultCredentialsError", "RefreshError", "NoCredentialsError"), 401),
    **dict.fromkeys(("Unauthenticated", "UnauthenticatedError", "Unauthorized"), 401),
    **dict.fromkeys(("PermissionError", "PermissionDeniedError", "Forbidden"), 403),
    **dict.fromkeys(("FileNotFoundError", "NotFoundError", "NotFound"), 404),
    **dict.fromkeys(("ResourceExhausted", "ResourceExhaustedError", "TooManyRequests"), 429),
    **dict.fromkeys(("UnavailableError", "ServiceUnavailable", "DeadlineExceededError"), 503),
    **dict.fromkeys(("ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError"), 503),
    **dict.fromkeys(("ClientConnectorError", "ServerDisconnectedError", "ClientOSError"), 503),
    **dict.fromkeys(("EndpointConnectionError", "TimeoutError", "ServerTimeoutError"), 503),
}


def folder(workdir: epath.PathLike, name: str = "--workdir") -> epath.Path:
    """Returns the path of a run's folder, `~` expanded.

    Args:
      workdir: as given by a user.
      name: of the flag or field that gave it, for the message.

    Raises:
      UsageError: a scheme that is not known, or a bucket without a name.
    """
    try:
        path = epath.Path(workdir).expanduser()
    except KeyError:
        known = ", ".join(f"{scheme}://" for scheme in PACKAGES)
        raise UsageError(f"{name}={workdir}: accepted are local paths and {known}") from None
    if is_remote(path) and not os.fspath(path).partition("://")[2].strip("/"):
        raise UsageError(f"{name}={workdir} names no bucket: write gs://BUCKET/FOLDER")
    return path


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether `path` lies in a bucket, where files are written whole or not at all."""
    return "://" in os.fspath(epath.Path(path))


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the path from the root: a local one resolved, one in a bucket as it is.

    `epath`'s own `resolve` puts the working directory before `gs://`.
    """
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.resolve()


def probe(workdir: epath.PathLike, say: Say = print) -> None:
    """Makes the folder of a run, then writes, reads, lists and removes a small file in it.

    Args:
      workdir: local path or `gs://bucket/folder`.
      say: takes a line for every retry.

    Raises:
      UsageError: no such bucket, not enough rights, not writable, full, or a package is missing.
      RunError: the storage stays busy or out of reach.
    """
    place = folder(workdir)
    try:
        retry(lambda: _try_out(place), say)
    except Exception as error:
        if is_busy(error):
            raise RunError(
                f"--workdir={workdir}: the storage does not answer ({describe(error)}) after "
                f"{ATTEMPTS} attempts; start again later"
            ) from error
        raise UsageError(f"--workdir={workdir} cannot be used: {_reason(place, error)}") from error


def check_shared(workdir: epath.PathLike, patience: float = 20.0) -> None:
    """Checks that every process sees the same folder; all call it, once the folder is there.

    Args:
      workdir: of the run.
      patience: seconds in which what one process writes must reach the others.

    Raises:
      UsageError: what process 0 writes is not seen elsewhere.
    """
    if jax.process_count() == 1:
        return
    place = folder(workdir)
    name = distributed.first(lambda: _leave_token(place))
    try:
        distributed.together(lambda: _await_token(place, name, patience))
    finally:
        distributed.first(lambda: (place / name).unlink(missing_ok=True))


def _leave_token(place: epath.Path) -> str:
    name = f".seen-by-all-{secrets.token_hex(4)}"
    (place / name).write_text(name)
    return name


def _await_token(place: epath.Path, name: str, patience: float) -> None:
    end = time.monotonic() + patience
    while not (place / name).exists():
        if time.monotonic() > end:
            raise UsageError(
                f"--workdir={place} is not the same folder on every host: this process does not "
                f"see what process 0 wrote there {patience:.0f} s ago; use a file system that all "
                "share, or a bucket (gs://...)"
            )
        time.sleep(0.2)


def retry(action: Callable[[], T], say: Say = print, attempts: int = ATTEMPTS) -> T:
    """Returns `action()`, tried again with growing pauses while the storage is busy.

    Each retry is counted in `RETRIES` and said. Any other error, and the last, is raised as it is.
    """
    for attempt in range(1, attempts):
        try:
            return action()
        except Exception as error:
            if not is_busy(error):
                raise
            pause = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            RETRIES[str(status(error))] += 1
            say(f"storage is busy ({describe(error)}): attempt {attempt + 1} in {pause:.1f} s")
            time.sleep(pause)
    return action()


def is_busy(error: BaseException) -> bool:
    """Returns whether the same request may succeed later: 408, 429, 5xx, no connection."""
    return status(error) in _BUSY or getattr(error, "errno", None) == errno.ESTALE


def status(error: BaseException) -> int | None:
    """Returns the HTTP status that an exception of a storage client stands for, where it has one.

    Knows the exceptions of gcsfs, s3fs, requests, aiohttp, google-auth and TensorFlow by their
    attributes and names.
    """
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("code", "status", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdecimal() and 400 <= int(value) < 600:
            return int(value)
    for kind in type(error).__mro__:
        if kind.__name__ in _STATUS_BY_NAME:
            return _STATUS_BY_NAME[kind.__name__]
    found = re.match(r"Forbidden\b", str(error))  # gcsfs raises a plain OSError
    if found:
        return 403
    return status(error.__cause__) if error.__cause__ is not None else None


def describe(error: BaseException) -> str:
    """Returns an exception in one line without secrets: `HttpError 503: backend error`."""
    code = status(error)
    text = " ".join(redact(str(error)).split())[:300]
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return text
    return f"{kind}{f' {code}' if code else ''}: {text}" if text else f"{kind} {code or ''}".strip()


def write(path: epath.PathLike, data: str | bytes) -> None:
    """Writes a small file whole or not at all.

    On a disk it takes its place only when it is complete and flushed; in a bucket an object
    appears when its upload is complete, and a busy storage is tried again.

    Raises:
      OSError (or what the storage's client raises): nothing was changed.
    """
    path = epath.Path(path)
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        retry(lambda: path.write_bytes(data))
        return
    part = f"{os.fspath(path)}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _try_out(place: epath.Path) -> None:
    """Does once all that a run will do: write, read, list, make a folder, remove."""
    if not is_remote(place):
        place.mkdir(parents=True, exist_ok=True)
    path = place / f".probe-{secrets.token_hex(4)}"
    content = b"probe" * 1000  # more than what a full disk still takes
    try:
        path.write_bytes(content)
        if path.read_bytes() != content:
            raise OSError("a file written was read back with another content")
        if path.name not in {found.name for found in place.iterdir()}:
            raise OSError("a file written is not in the folder's list")
        if is_remote(place):  # after the write: some clients would make a missing bucket here
            place.mkdir(parents=True, exist_ok=True)
    except BaseException:
        with contextlib.suppress(Exception):
            path.unlink()
        raise
    path.unlink()


def _reason(place: epath.Path, error: Exception) -> str:
    """What stands in the way, and what to do about it."""
    if not is_remote(place):
        return _local_reason(error)
    scheme, _, rest = os.fspath(place).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if isinstance(error, ImportError):
        package = PACKAGES[scheme]
        return f"{scheme}:// needs the package {package}: pip install {package}"
    code = status(error)
    if code == 404:
        return f"there is no bucket {bucket} ({describe(error)}); make it, or mend the name"
    if code == 401:
        login = "gcloud auth application-default login" if scheme == "gs" else "the client's login"
        return f"no valid credentials for {bucket} ({describe(error)}): run {login}"
    if code == 403:
        rights = "read, write, list and delete objects"
        if scheme == "gs":
            rights = (
                "roles/storage.objectUser and, for storage.buckets.get, "
                "roles/storage.legacyBucketReader"
            )
        return f"access to {bucket} is denied ({describe(error)}): this account needs {rights}"
    return describe(error)


def _local_reason(error: Exception) -> str:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no right to write there",
        errno.EPERM: "no right to write there",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EEXIST: "it is a file, not a folder",
    }
    reason = reasons.get(getattr(error, "errno", None) or 0)
    return f"{reason} ({describe(error)})" if reason else describe(error)
