"""The commands a newcomer types: those in README exist, and set-up explains its failures."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _setup(folder: pathlib.Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess:
    """Runs .ci/setup_venv in `folder` as from a shell without settings of pip."""
    kept = {key: v for key, v in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        [str(folder / ".ci" / "setup_venv"), *arguments],
        env=kept | {"PIP_CONFIG_FILE": os.devnull, "HOME": str(folder)} | extra,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def clone(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with what set-up reads, and nothing installed."""
    for name in ("setup.cfg", "pyproject.toml", ".ci/setup_venv"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path


def _fake_python(path: pathlib.Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_command_in_the_readme_is_a_target():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    shown = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(_code(readme.read_text()))))
    assert {"demo", "test"} <= shown
    assert shown <= _targets()


def test_every_python_command_in_the_readme_names_a_module():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    for module in re.findall(r"python3? -m ([\w.]+)", "\n".join(_code(readme.read_text()))):
        path = ROOT / module.replace(".", "/")
        known = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert known or module in ("pip", "venv", "pytest"), f"README shows python -m {module}"


def _code(markdown: str) -> list[str]:
    """Code blocks and inline code of a Markdown text: prose may `make` sentences."""
    blocks = re.findall(r"```.*?\n(.*?)```", markdown, re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))


def test_the_default_target_lists_every_command():
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(["make"], cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 0
    for target in _targets() - {"help", "setup-demo", "setup-test"}:
        assert f"make {target}" in done.stdout


def test_setup_refuses_an_interpreter_that_is_too_old_or_broken(clone):
    old = _fake_python(clone / "python3", "exit 1")
    done = _setup(clone, ".venv", "data", old)
    assert done.returncode == 1
    assert "older than Python 3.11" in done.stderr and "PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_setup_passes_over_a_python3_that_is_too_old(clone):
    """A pyenv shim or a system's python3 may not do; python3.11 beside it does."""
    _fake_python(clone / "python3", "exit 1")
    _fake_python(clone / "python3.11", f'exec "{sys.executable}" "$@"')
    (clone / ".venv").write_text("in the way")
    done = _setup(clone, PATH=f"{clone}:{os.environ['PATH']}")
    assert done.returncode == 1 and "is not a virtual environment" in done.stderr


@pytest.mark.long
def test_setup_without_the_index_explains_itself_and_is_redone(clone):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_TIMEOUT": "2"}
    done = _setup(clone, ".venv", "data", sys.executable, **nowhere)
    assert done.returncode == 1
    assert done.stdout.startswith("setup: .venv with Python 3.")
    assert "package index could not be reached" in done.stderr
    assert (clone / ".venv" / ".jaxmodels").read_text() == "installing\n"
    again = _setup(clone, ".venv", "data", sys.executable, **nowhere)
    assert "the last set-up was interrupted" in again.stdout
