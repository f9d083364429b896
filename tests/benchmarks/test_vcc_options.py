"""The benchmark of options: its sides compute what they say, and what it writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import vcc_options
from jaxmodels.vcc import VccConfig, layer_kinds
from tests.vcc import small_t5

TINY = dataclasses.replace(small_t5.RELU, num_layers=3)
VCC = VccConfig(layer_kinds(1, 2), num_vip=4, block_size=4, num_fine_blocks=8, segment_length=8)


@pytest.mark.slow
def test_a_kept_document_gives_what_is_encoded_together() -> None:
    found = []
    for side in vcc_options.SIDES["questions"]:
        function, arguments = vcc_options.make_program("questions", side, TINY, VCC, 28)
        found.append(jax.jit(function)(*arguments))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.fixture(scope="module")
def rows() -> list:
    """Of two sides, which compile half as long as all four."""
    kept = ("exact", "half of the attention")
    with pytest.MonkeyPatch.context() as patch:
        sides = {side: vcc_options.SIDES["training"][side] for side in kept}
        patch.setattr(vcc_options, "SIDES", {"training": sides})
        return vcc_options.measure_options(
            44, trunk=TINY, vcc=VCC, parts=("training",), rounds=1, seconds=0.0
        )


@pytest.mark.slow
def test_rows_are_complete_and_a_share_opens_fewer(rows: list) -> None:
    assert [row["side"] for row in rows] == ["exact", "half of the attention"]
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert rows[0]["opened"] == 1.0 and 0 < rows[1]["opened"] < 1
    assert json.loads(json.dumps(rows)) == rows
    lines = vcc_options.table(rows).splitlines()
    assert lines[0].split() == ["part", "side", "ms", "ratio", "peak", "MiB", "opened"]
    assert lines[2].split()[0] == "training" and lines[2].split()[-1] == "100%"


@pytest.mark.slow
def test_the_figure_has_a_bar_a_side(rows: list) -> None:
    pytest.importorskip("matplotlib")
    (axis,) = vcc_options.options_figure(rows).axes
    assert len(axis.patches) == len(rows)
    assert "1.00x" in {text.get_text() for text in axis.texts}


def test_an_unknown_side_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="'answering'.*'to rows'"):
        vcc_options.make_program("answering", "to blocks", TINY, VCC, 28)
