"""The notebooks run from the first cell to the last, as plain Python and with small sizes."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What each notebook's first cell sets, made small.
SMALL: dict[str, dict[str, Any]] = {
    "vcc_t5_16k": {
        **{"LENGTH": 512, "NUM_VIP": 16, "NUM_FINE_BLOCKS": 4, "SEGMENT": 128},
        "DOCUMENT": "The house stood by the sea. " * 70,
    },
}


def cells(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: pathlib.Path) -> None:
    for cell in cells(path):
        assert cell["cell_type"] == "markdown" or not cell["outputs"]
        assert "/home/" not in "".join(cell["source"])


@pytest.fixture
def quick_compiles() -> Iterator[None]:
    """Compiles without optimisation: everything runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_order(
    path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    first, *rest = ("".join(c["source"]) for c in cells(path) if c["cell_type"] == "code")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(first, f"{path.name}[0]", "exec"), names)
    assert SMALL[path.stem].keys() <= names.keys(), "a setting that the first cell does not have"
    names |= SMALL[path.stem]
    for number, text in enumerate(rest, start=1):
        exec(compile(text, f"{path.name}[{number}]", "exec"), names)
    said = capsys.readouterr().out
    assert "4 of 31 blocks opened in each of 2 layers" in said
    assert len(names["answer"]) == 16
