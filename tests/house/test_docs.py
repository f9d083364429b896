"""The code in the documentation runs as it stands, and prints what stands beside it."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("docs/adding_a_method.md",)
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PRINTS = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = _BLOCK.findall(text)
    assert len(blocks) == text.count("```python")
    names: dict = {"__name__": page}
    for block in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, page, "exec"), names)  # noqa: S102
        wanted = [line.split(":")[0] for line in _PRINTS.findall(block)]
        assert said.getvalue().splitlines() == wanted
