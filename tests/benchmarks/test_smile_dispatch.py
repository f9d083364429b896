"""The dispatch on one device: three ways, one result, dropped tokens and gradients included."""

import jax
import numpy as np
import pytest

from benchmarks import smile_dispatch


def test_every_way_gives_what_a_loop_gives_and_drops_the_same_tokens():
    slots, (x, slot, gate) = smile_dispatch.inputs(40, 6, 4)
    assert (slot < 0).any()  # some are dropped, else half of this shows nothing
    wanted = np.where(np.asarray(slot)[:, None] < 0, 0, np.asarray(gate)[:, None] * np.asarray(x))
    for side, function in smile_dispatch.sides(slots).items():
        np.testing.assert_allclose(function(x, slot, gate), wanted, atol=1e-6, err_msg=side)


def test_both_directions_are_timed_and_compared():
    rows = smile_dispatch.measure_size((24, 4, 2), rounds=1, seconds_budget=2)
    assert [(row["kind"], row["side"]) for row in rows] == [
        (kind, side)
        for kind in ("forward", "forward+backward")
        for side in ("library", "scatter", "one-hot")
    ]
    assert all(row["median_ms"] > 0 and row["slots"] == 30 for row in rows)


def test_a_way_that_differs_is_not_timed():
    one = jax.numpy.ones(3)
    with pytest.raises(RuntimeError, match="'scatter' differs"):
        smile_dispatch._check({"library": one, "scatter": one + 0.1})
