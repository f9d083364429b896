"""Real processes of two devices each train the masked LM as one process does."""

import numpy as np
import pytest

from tests.multiprocess import launcher, reference
from tests.smile import tiny

pytestmark = pytest.mark.slow

ROUTINGS = {"bi_level": tiny.BI_LEVEL, "one_level": tiny.TWO_HOP}


def trained(folder, count: int, routings: list[str]) -> dict:
    """{routing: (run of one process, run of `count` processes)} on a grid of count x 2."""
    pairs, words = {}, []
    for name in routings:
        flags = tiny.flags((count, 2), ROUTINGS[name])
        alone, together = folder / f"{name}_alone", folder / name
        pairs[name] = tiny.train(alone, *flags), together
        words += [*flags, *tiny.places(together), f"--config.mesh.node={count}", "--then"]
    script = ("-m", "tests.smile.processes_script", *words)
    group = launcher.run(count, folder / "logs", *script, devices=2, **reference.CACHE)
    assert f"mesh node {count} x device 2, {count} processes" in group[0].text
    return pairs


def check(alone, together) -> None:
    """Losses, routing, gradients and parameters of 20 steps."""
    wanted, found = tiny.curve(alone), tiny.curve(together)
    assert {"loss", "grad_norm", "load_entropy", "dropped_total"} <= wanted.keys() == found.keys()
    assert len(wanted["loss"]) == 20 and wanted["loss"][-1] < wanted["loss"][0] - 0.1
    assert wanted["dropped_total"].max() > 0.05  # places at capacity matter here
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    close(tiny.gradients(together), tiny.gradients(alone), 1e-4)
    close(tiny.flat(tiny.state(together).params), tiny.flat(tiny.state(alone).params), 1e-4)


def close(found: dict, wanted: dict, tolerance: float) -> None:
    """Compares leaf by leaf; relative to the largest value of a leaf."""
    assert found.keys() == wanted.keys() and any("experts" in path for path in wanted)
    for path, leaf in wanted.items():
        bound = tolerance * max(np.abs(leaf).max(), 1e-4)
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=bound, err_msg=path)


def test_two_processes_train_as_one(tmp_path) -> None:
    check(*trained(tmp_path, 2, ["bi_level"])["bi_level"])
