"""The bars of .ci/size_bars.py must see each kind of violation, and pass a tidy tree."""

import importlib.util
import pathlib
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("size_bars", ROOT / ".ci" / "size_bars.py")
size_bars = importlib.util.module_from_spec(_SPEC)
sys.modules["size_bars"] = size_bars
_SPEC.loader.exec_module(size_bars)

TIDY = '''\
"""Adds numbers."""


def add(a: int, b: int) -> int:
    """Sum of both."""
    return a + b


class Adder:
    """Adds a constant."""

    def __init__(self, constant: int):
        self.constant = constant

    def __call__(self, value: int) -> int:
        return value + self.constant

    def _hidden(self, anything):
        def nested(x, y):
            return x

        return nested
'''


def _write(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


def _failed(root: pathlib.Path) -> dict[str, size_bars.Bar]:
    """Failing bars by name; the ratio of tests is left out unless the tree has tests."""
    ratio = "code lines of tests / of library"
    bars = [bar for bar in size_bars.bars(root) if not bar.passed]
    return {bar.name: bar for bar in bars if bar.name != ratio or (root / "tests").is_dir()}


def _function(lines: int) -> str:
    body = "\n".join(f"    x{i} = {i}" for i in range(lines - 1))
    return f'"""Why."""\ndef _f() -> None:\n{body}\n'


def test_a_tidy_tree_passes(tmp_path):
    tests = '"""Tests."""\n' + "\n".join(f"a{i} = {i}" for i in range(10))
    root = _write(tmp_path, {"jaxmodels/add.py": TIDY, "tests/test_add.py": tests})
    assert _failed(root) == {}
    assert size_bars.main([str(root)]) == 0


@pytest.mark.parametrize(
    "name, text, bar, where",
    [
        ("jaxmodels/a.py", "x = 1\n" * 601, "file lines, median/p90/max", "a.py: 601 lines"),
        (
            "jaxmodels/a.py",
            _function(101),
            "function lines, median/p90/max",
            "a.py:2 _f: 101 lines",
        ),
        ("kernels_pallas/a.py", _function(201), "kernel function lines, max", "a.py:2 _f"),
        (
            "jaxmodels/a.py",
            "def _f(a, b, c, d, e, f, g, *h, i=0): pass",
            "arguments of a function",
            "a.py:1 _f: 9",
        ),
        (
            "jaxmodels/a.py",
            '"""Why."""\nclass A:\n    """A."""\n    def f(self, x) -> int: return 1',
            "annotated public functions",
            "a.py:4 A.f",
        ),
        (
            "jaxmodels/a.py",
            '"""Why."""\nclass A:\n    """A."""\n    def setup(self): self.x = 1',
            "annotated public functions",
            "a.py:4 A.setup",
        ),
        (
            "jaxmodels/a.py",
            '"""Why."""\ndef f() -> int: return 1',
            "public names with a docstring",
            "a.py:2 f",
        ),
        ("jaxmodels/a.py", "_x = 1", "public names with a docstring", "a.py:1 module"),
        ("benchmarks/a.py", "_x = 1", "public names with a docstring", "a.py:1 module"),
    ],
)
def test_each_violation_is_found_and_located(tmp_path, name, text, bar, where):
    failed = _failed(_write(tmp_path, {name: text}))
    assert failed[bar].offenders[0].endswith(where)
    assert size_bars.main([str(tmp_path)]) == 1


def test_medians_and_percentiles_are_held_not_only_the_maximum(tmp_path):
    many = {f"jaxmodels/f{i}.py": _function(13) for i in range(3)}
    assert list(_failed(_write(tmp_path, many))) == ["function lines, median/p90/max"]
    tail = {f"jaxmodels/f{i}.py": _function(2) for i in range(8)}
    tail |= {f"jaxmodels/g{i}.py": _function(41) for i in range(2)}
    failed = _failed(_write(tmp_path / "tail", tail))
    assert failed["function lines, median/p90/max"].measured == "2/41/41"


def test_the_limits_themselves_are_allowed(tmp_path):
    files = {f"jaxmodels/f{i}.py": _function(2) for i in range(20)}
    files["jaxmodels/a.py"] = _function(100)
    files["jaxmodels/b.py"] = '"""Why."""\ndef _f(a, b, c, d, e, f, g, h): pass'
    files["jaxmodels/c.py"] = '"""Why."""\nclass _A:\n  def f(self, b, c, d, e, f, g, h, i): pass'
    files["kernels_pallas/a.py"] = _function(200)
    assert _failed(_write(tmp_path, files)) == {}


@pytest.mark.parametrize(
    "first, second",
    [
        ("from jaxmodels import b", "import jaxmodels.a"),
        ("from . import b", "def _f():\n    from .a import _g"),
        ("from jaxmodels.b import x", "from jaxmodels.a import y"),
    ],
)
def test_a_cycle_of_modules_is_found_however_it_is_written(tmp_path, first, second):
    files = {"jaxmodels/a.py": f'"""A."""\n{first}', "jaxmodels/b.py": f'"""B."""\n{second}'}
    failed = _failed(_write(tmp_path, files))
    assert failed["import cycles, modules of jaxmodels"].offenders == (
        "jaxmodels.a <-> jaxmodels.b",
    )


def test_a_package_may_gather_the_names_of_its_modules(tmp_path):
    files = {
        "jaxmodels/vcc/__init__.py": '"""V."""\nfrom .model import M',
        "jaxmodels/vcc/model.py": '"""M."""\nfrom jaxmodels.vcc import parts',
        "jaxmodels/vcc/parts.py": '"""P."""\nx = 1',
    }
    assert _failed(_write(tmp_path, files)) == {}


def test_a_cycle_of_top_level_packages_is_found(tmp_path):
    files = {
        "jaxmodels/a.py": '"""A."""\nimport train.main',
        "train/main.py": '"""M."""\nimport jaxmodels.b',
        "jaxmodels/b.py": '"""B."""\nx = 1',
    }
    failed = _failed(_write(tmp_path, files))
    assert failed["import cycles, top-level packages"].offenders == ("jaxmodels <-> train",)


@pytest.mark.parametrize("tests, passed, status", [(5, False, 1), (6, True, 0), (11, False, 0)])
def test_too_few_tests_fail_and_too_many_warn(tmp_path, tests, passed, status):
    code = '"""Why."""\n' + "\n".join(f"_x{i} = {i}" for i in range(10))
    test = "\n\n".join(f"x{i} = {i}  # a comment" for i in range(tests))
    root = _write(tmp_path, {"jaxmodels/a.py": code, "tests/test_a.py": test})
    (bar,) = [bar for bar in size_bars.bars(root) if bar.name.startswith("code lines of tests")]
    assert bar.passed == passed and bar.measured.endswith(f"({tests}/10)")
    assert size_bars.main([str(root)]) == status


def test_code_lines_leave_out_blanks_comments_and_docstrings(tmp_path):
    text = '"""Why.\n\nMore."""\n\n# note\nx = """a\nb"""\n'
    text += '\ndef f():\n    "doc"\n    return (\n\n1)\n'
    path = _write(tmp_path, {"jaxmodels/a.py": text}) / "jaxmodels" / "a.py"
    assert size_bars.parse(tmp_path, path).code_lines == 5


def test_the_bars_are_those_agreed():
    assert size_bars.FILE_LINES == {"median": 180, "p90": 400, "max": 600}
    assert size_bars.FUNCTION_LINES == {"median": 12, "p90": 40, "max": 100}
    assert (size_bars.KERNEL_FUNCTION_LINES, size_bars.MAX_ARGUMENTS) == (200, 8)
    assert (size_bars.MAX_CODE_LINES, size_bars.TEST_RATIO) == (33_000, (0.6, 1.0))
