"""Real processes of two devices each train the masked LM as one process does."""

import numpy as np
import pytest

from tests import conftest
from tests.multiprocess import launcher, reference
from tests.smile import tiny

pytestmark = pytest.mark.slow


def close(found: dict, wanted: dict, tolerance: float) -> None:
    """Compares leaf by leaf; relative to the largest value of a leaf."""
    assert found.keys() == wanted.keys() and any("experts" in path for path in wanted)
    for path, leaf in wanted.items():
        bound = tolerance * max(np.abs(leaf).max(), 1e-4)
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=bound, err_msg=path)


@pytest.mark.parametrize(
    ("count", "routing"),
    [
        (2, tiny.BI_LEVEL),
        pytest.param(2, tiny.TWO_HOP, marks=pytest.mark.long),
        pytest.param(4, tiny.BI_LEVEL, marks=pytest.mark.long),
        pytest.param(4, tiny.TWO_HOP, marks=pytest.mark.long),
    ],
    ids=["2-bi_level", "2-two_hop", "4-bi_level", "4-two_hop"],
)
def test_processes_train_as_one(tmp_path, monkeypatch, count, routing) -> None:
    """Losses, routing, gradients and parameters of 20 steps, on a grid of count x 2."""
    flags = tiny.flags((count, 2), routing)
    alone = tiny.train(tmp_path / "alone", *flags)
    together = tmp_path / "together"
    monkeypatch.setenv("XLA_FLAGS", conftest.QUICK)  # each process compiles for itself
    command = ("-m", "train.main", *flags, *tiny.places(together), f"--config.mesh.node={count}")
    with launcher.started(
        count, tmp_path / "logs", *command, devices=2, **reference.CACHE
    ) as group:
        assert group.wait(400) == [0] * count, group.logs()
    assert f"mesh node {count} x device 2, {count} processes" in group[0].text

    wanted, found = tiny.curve(alone), tiny.curve(together)
    assert {"loss", "grad_norm", "load_entropy", "dropped_total"} <= wanted.keys() == found.keys()
    assert len(wanted["loss"]) == 20 and wanted["loss"][-1] < wanted["loss"][0] - 0.1
    assert wanted["dropped_total"].max() > 0.05  # places at capacity matter here
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    close(tiny.gradients(together), tiny.gradients(alone), 1e-4)
    close(tiny.flat(tiny.state(together).params), tiny.flat(tiny.state(alone).params), 1e-4)
