"""The run of two processes that nothing happens to. Made once; tests look at it or copy it."""

import os
import pathlib
import shutil

import pytest

from tests.multiprocess import launcher

SETTINGS = {"checkpoint_every": 6, "eval_every": 8, "keep_checkpoints": 9}
FLAGS = (
    "--config=tests/train/toy_config.py:quickstart",
    *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
    "--config.distributed.heartbeat_seconds=10",
)
TRAIN = ("-m", "train.main", *FLAGS)
MEMBER = ("-m", "tests.multiprocess.member", *FLAGS)
# Compiled programs are kept beside pytest's own cache: a second run of the tests is faster.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(launcher.ROOT / ".pytest_cache" / "processes")
    )
}


_made: list[launcher.Group] = []


def two(factory: pytest.TempPathFactory) -> launcher.Group:
    """The processes; their logs lie in the workdir's parent."""
    if not _made:
        folder = factory.mktemp("two")
        _made.append(launcher.run(2, folder, *TRAIN, f"--workdir={folder}/run", **CACHE))
    return _made[0]


def workdir(group: launcher.Group) -> pathlib.Path:
    """Where a group of `launcher.run` or `started` has trained."""
    return group[0].log.parent / "run"


def copy_until(step: int, whole: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Copies a run as it was when `step` had been saved, the later ones not."""
    shutil.copytree(whole, to)
    for folder in (to / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    return to
