"""The notebooks run from the first cell to the last, as plain Python and with small sizes."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests.house import run_notebook

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# What each notebook's first cell sets, made small.
SMALL: dict[str, dict[str, Any]] = {
    "smile_routing": {"EXPERTS": 8, "TOKENS": 16, "WIDTH": 8, "INNER": 8, "STEPS": 2},
    "vcc_t5_16k": {
        **{"LENGTH": 512, "NUM_VIP": 16, "NUM_FINE_BLOCKS": 4, "SEGMENT": 128},
        "DOCUMENT": "The house stood by the sea. " * 70,
    },
}


def test_every_notebook_is_run_here() -> None:
    assert NOTEBOOKS.keys() == SMALL.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    for cell in run_notebook.cells(NOTEBOOKS[name]):
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
def test_vcc_opens_blocks_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    names = run_notebook.run(NOTEBOOKS["vcc_t5_16k"], SMALL["vcc_t5_16k"])
    assert "4 of 31 blocks opened in each of 2 layers" in capsys.readouterr().out
    assert len(names["answer"]) == 16


@pytest.mark.long
def test_smile_routes_over_eight_devices_that_it_simulates(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = str(NOTEBOOKS["smile_routing"]), json.dumps(SMALL["smile_routing"])
    settings = {"JAX_PLATFORMS": "cpu", "JAXMODELS_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.house.run_notebook", *arguments],
        cwd=ROOT,
        env=os.environ | settings | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "mesh of 2 x 4 cpu devices" in said
    assert "all gradients are bit-identical" in said
    assert "bi_level two_hop   {'device': 2, 'node': 3}: 9 messages, 3 between nodes" in said
    assert "small buffers  dropped 0%, 128 rows of 128 computed, overflow 1" in said
