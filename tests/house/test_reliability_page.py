"""docs/reliability.md promises nothing without a test that exists, and forgets no fault."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
FAULTS = {
    *range(1, 12),
    *range(13, 25),
    *range(28, 35),
    *range(36, 39),
    *(42, 43),
}
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def _section(title: str) -> str:
    text = PAGE.read_text()
    start = text.index(f"\n## {title}\n")
    end = text.find("\n## ", start + 1)
    return text[start : end if end > 0 else None]


def _rows() -> list[str]:
    lines = [line for line in _section("Promises").splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith(("| fault |", "| promise |"))]


def _functions(path: pathlib.Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", _rows())
def test_each_promise_names_a_test_that_exists(row):
    named = _TEST.findall(row)
    assert named, f"no test is named: {row}"
    for file, function in named:
        assert (ROOT / file).is_file(), f"{file} does not exist"
        assert function in _functions(ROOT / file), f"{file} has no {function}"
        assert function.startswith("test_")


def test_every_fault_has_a_row_with_a_test_of_its_number():
    rows = [(re.match(r"\| F(\d+) \|", row), row) for row in _rows()]
    found = {int(match[1]): row for match, row in rows if match}
    assert set(found) >= FAULTS, f"missing: {sorted(FAULTS - set(found))}"
    for match, row in rows:
        if match:
            numbers = {
                int(n) for _, name in _TEST.findall(row) for n in re.findall(r"_f(\d+)", name)
            }
            assert int(match[1]) in numbers, row


def test_every_named_test_of_a_promised_fault_is_still_there():
    """A fault that has a row has at least one test in the suite that carries its number."""
    names = [name for path in (ROOT / "tests").rglob("test_*.py") for name in _functions(path)]
    numbers = {int(n) for name in names for n in re.findall(r"^test_f(\d+)_", name)}
    assert numbers >= FAULTS, f"no test: {sorted(FAULTS - numbers)}"


def test_the_files_of_a_workdir_are_those_that_the_code_names():
    from train import lock, run, rundir, starts
    from train.checkpoint import manifest
    from train.checkpoint.folder import DAMAGED, FROZEN

    page = _section("The workdir")
    for name in (lock.FILE, manifest.NAME, rundir.CONFIG, run.OWED, starts.FILE, DAMAGED, FROZEN):
        assert name in page, name


def test_every_link_of_the_pages_leads_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
