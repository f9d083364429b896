"""The training step compiled for TPU slices that are not there: which all-to-all goes over what."""

import importlib.util
import json

import pytest

from tests.smile import tiny
from tests.train import runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler"),
]
FLAT = {"moe.routing": "one_level", "moe.transport": "flat"}
# A table of words too small to be split: looking words up needs no exchange then.
SMALL = {"model.d_model": 12, "mesh.node": 2}
TOKENS = 8 * 32 // 8  # of a device


def exchanges(folder, *settings) -> tuple[dict, str]:
    """({(axes, network): row} of the all-to-alls on two slices of four, what was printed)."""
    flags = tiny.flags((2, 4), SMALL, {"moe.capacity_factor": 1.0}, *settings)
    where = (f"--json={folder}/report.json", f"--config.data.dir={folder}/data")
    target = ("--topology=v5e:2x2", "--slices=2")
    done = runs.python("-m", "train.compile", *flags, *target, *where)
    assert done.returncode == 0, done.stderr[-3000:]
    (program,) = json.loads((folder / "report.json").read_text())["programs"]
    rows = [row for row in program["traffic"] if row["kind"] == "all-to-all"]
    return {(row["axes"], row["network"]): row for row in rows}, done.stdout


BUFFER = 4 * TOKENS * SMALL["model.d_model"]  # bytes of a device's tokens


def test_of_two_levels_only_the_exchange_between_nodes_is_on_dcn(tmp_path) -> None:
    found, text = exchanges(tmp_path, tiny.BI_LEVEL)
    assert set(found) == {("device", "ICI"), ("node", "DCN")}
    inside, across = found["device", "ICI"], found["node", "DCN"]
    # There and back, forward and backward: four at each level. How many rows came is sent as well.
    assert inside["count"] == 4 and across["count"] == 5
    # What only a product of bfloat16s reads, the compiler sends as bfloat16.
    assert 3 * BUFFER < inside["bytes"] <= 4 * BUFFER
    assert 3 * BUFFER < across["bytes"] <= 4 * BUFFER + 64
    assert inside["sent"] == inside["bytes"] * 3 // 4 and across["sent"] == across["bytes"] // 2
    assert "bi_level routing on 2 nodes x 4 devices, transport two_hop (auto: " in text


@pytest.mark.long
def test_a_flat_exchange_is_on_dcn_with_all_it_sends(tmp_path) -> None:
    found, _ = exchanges(tmp_path, FLAT)
    assert set(found) == {("node+device", "DCN")}
    row = found["node+device", "DCN"]
    assert row["count"] == 4 and 3 * BUFFER < row["bytes"] <= 4 * BUFFER
    assert row["sent"] == row["bytes"] * 7 // 8  # seven of eight parts, not one half
