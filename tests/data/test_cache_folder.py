"""Folders that are built once: whole or absent, whoever dies or damages them."""

import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from jaxmodels.data import cache_folder


class Builder:
    """Writes one file and counts how often it was asked."""

    def __init__(self, content: str = "content", seconds: float = 0.0) -> None:
        self.calls, self.content, self.seconds = 0, content, seconds

    def __call__(self, work: pathlib.Path) -> dict[str, Any]:
        self.calls += 1
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text(self.content)
        time.sleep(self.seconds)
        return {"rows": 3}


def test_second_use_builds_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = Builder()
    first = cache_folder.ensure(tmp_path / "x", {"a": 1}, build, "preparing x")
    assert first == cache_folder.ensure(tmp_path / "x", {"a": 1}, build, "preparing x")
    assert build.calls == 1 and first["facts"] == {"rows": 3}
    assert capsys.readouterr().err == "preparing x\n"


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest", "empty"])
def test_a_damaged_folder_is_built_again(tmp_path: pathlib.Path, damage: str) -> None:
    folder, build = tmp_path / "x", Builder()
    cache_folder.ensure(folder, {}, build)
    file, manifest = folder / "sub" / "file", folder / "manifest.json"
    if damage == "flip":
        file.write_text("contemt")
    elif damage == "cut":
        file.write_text("con")
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text('{"settings": {}')
    else:
        file.unlink(), manifest.unlink()
    cache_folder.ensure(folder, {}, build)
    assert build.calls == 2 and file.read_text() == "content"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["x"]


def test_other_settings_are_built_anew(tmp_path: pathlib.Path) -> None:
    build = Builder()
    cache_folder.ensure(tmp_path / "x", {"a": (1, 2)}, build)
    cache_folder.ensure(tmp_path / "x", {"a": [1, 2]}, build)
    assert build.calls == 1
    cache_folder.ensure(tmp_path / "x", {"a": [1, 3]}, build)
    assert build.calls == 2


def test_a_failing_build_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def build(work: pathlib.Path) -> dict[str, Any]:
        (work / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache_folder.ensure(tmp_path / "x", {}, build)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_leftovers_of_a_killed_builder_go_once_they_are_old(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    old.mkdir(), new.mkdir()
    os.utime(old, (1, 1))
    cache_folder.ensure(tmp_path / "x", {}, Builder())
    assert not old.exists() and new.exists()


def test_threads_at_once_build_once(tmp_path: pathlib.Path) -> None:
    build = Builder(seconds=0.2)
    run = [
        threading.Thread(target=cache_folder.ensure, args=(tmp_path / "x", {}, build))
        for _ in range(4)
    ]
    for thread in run:
        thread.start()
    for thread in run:
        thread.join()
    assert build.calls == 1


def test_processes_at_once_build_once_and_a_killed_one_is_no_obstacle(
    tmp_path: pathlib.Path,
) -> None:
    program = """
import pathlib, sys, time
from jaxmodels.data import cache_folder
def build(work):
    (work / "file").write_text("whole")
    time.sleep(float(sys.argv[2]))
    return {}
cache_folder.ensure(pathlib.Path(sys.argv[1]), {}, build, "building")
"""

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "x"), str(seconds)]
        root = str(pathlib.Path(cache_folder.__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": root}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    killed = start(600)
    assert killed.stderr.readline() == "building\n"
    killed.kill()
    killed.communicate()
    both = [start(0.3), start(0.3)]
    printed = "".join(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert printed == "building\n"
    assert (tmp_path / "x" / "file").read_text() == "whole"


def test_a_place_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot prepare data in .*file.*data_dir"):
        cache_folder.ensure(tmp_path / "file" / "x", {}, Builder())
