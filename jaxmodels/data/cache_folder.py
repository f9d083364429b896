"""Folders that are built once: complete or absent, checked by digest, safe with several "
"processes."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_MANIFEST = "manifest.json"
_BUILDING = ".building-"
_ABANDONED_AFTER = 3600.0  # seconds


def ensure(
    folder: Path,
    settings: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    message: str = "",
) -> dict[str, Any]:
    """Returns the manifest of `folder`; builds the folder first when it is not intact.

    Intact means: made with the same `settings`, and every file has the SHA-256 it was written with.
    A folder appears by one rename. Processes that want it at once wait for the one that builds.

    Args:
      folder: where the result belongs.
      settings: JSON values that decide the content.
      build: writes the files into the empty folder that it is given, returns facts to remember.
      message: printed to stderr when something is built.

    Returns:
      {"settings", "files": {relative path: SHA-256}, "facts": what `build` returned}.

    Raises:
      ValueError: the folder cannot be made or written.
    """
    settings = json.loads(json.dumps(settings))
    manifest = _intact(folder, settings)
    if manifest is None:
        with _locked(folder.parent):
            manifest = _intact(folder, settings)  # another process may have built it meanwhile
            if manifest is None:
                manifest = _build(folder, settings, build, message)
    return manifest


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hexadecimal SHA-256 of the file at `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(values: Any) -> str:
    """Returns the hexadecimal SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _intact(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        if manifest["settings"] != settings:
            return None
        digests = {name: sha256(folder / name) for name in manifest["files"]}
        return manifest if digests == manifest["files"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(
    folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]], message: str
) -> dict[str, Any]:
    """Builds beside `folder` and moves the result there; the caller holds the lock."""
    if message:
        print(message, file=sys.stderr, flush=True)
    _remove_abandoned(folder.parent)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_BUILDING))
    made, old = work / "made", work / "old"
    try:
        made.mkdir()
        facts = build(made)
        files = sorted(path for path in made.rglob("*") if path.is_file())
        digests = {path.relative_to(made).as_posix(): sha256(path) for path in files}
        manifest = {"settings": settings, "files": digests, "facts": json.loads(json.dumps(facts))}
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        if folder.exists():
            folder.rename(old)  # damaged: out of the way in one step, deleted below
        made.rename(folder)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Deletes what builders that were killed left behind, not what another host may be building."""
    for left in root.glob(f"{_BUILDING}*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_AFTER:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lets one process at a time build under `root`; the system frees the lock of a dead one."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise ValueError(f"cannot prepare data in {root}: {error}. Choose another data_dir") from (
            error
        )
    with lock:
        # Without locks (some network file systems) two processes build twice, which the final
        # rename makes harmless.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
