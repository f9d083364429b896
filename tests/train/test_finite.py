"""The check of each step's numbers, on made-up health vectors."""

import numpy as np
import pytest

from train.errors import RunError
from train.finite import FiniteCheck

PATHS = ["a/kernel", "b/bias", "c"]


def health(loss, *squares, skipped=0.0):
    return np.asarray([loss, skipped, *squares], np.float32)


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (health(np.nan, 1, 1, 1), "step 3: loss is nan; the run stops"),
        (health(-np.inf, 1, 1, 1), "step 3: loss is -inf; the run stops"),
        (health(1, 1, np.inf, 1), "step 3: the gradient of b/bias is inf; the run stops"),
        (health(1, 1, np.nan, np.nan), r"b/bias is nan \(and 1 of 2 others\); the run stops"),
    ],
)
def test_what_is_not_finite_is_named(vector, said):
    with pytest.raises(RunError, match=said):
        FiniteCheck(PATHS, skips_nonfinite=False).check(3, vector)


def test_finite_numbers_are_worth_no_line():
    check = FiniteCheck(PATHS, skips_nonfinite=False)
    assert [check.check(step, health(1.0, 1, 2, 0)) for step in range(200)] == [None] * 200


def test_spikes_are_measured_against_the_median_of_the_last_losses():
    check = FiniteCheck(PATHS, skips_nonfinite=False)
    for step in range(10):
        assert check.check(step, health(2.0 if step % 2 else 4.0, 1, 1, 1)) is None
    assert "loss 400 is 133 times the usual 3" in check.check(10, health(400, 1, 1, 1))
    assert check.check(11, health(250, 1, 1, 1)) is None


def test_an_early_spike_has_nothing_to_be_compared_with():
    check = FiniteCheck(PATHS, skips_nonfinite=False)
    assert check.check(1, health(1e-3, 1, 1, 1)) is None
    assert check.check(2, health(1e6, 1, 1, 1)) is None


def test_skipped_updates_are_counted_on_from_earlier_parts_of_the_run():
    check = FiniteCheck(PATHS, skips_nonfinite=True, skipped=4)
    assert check.check(9, health(np.nan, 1, 1, 1, skipped=1)).endswith("update skipped, 5 in all")
    assert "grad_norm 13" in check.check(10, health(1, 25, 144, 0, skipped=1))
    assert check.skipped == 6


def test_a_hundred_skipped_in_a_row_end_the_run_but_one_good_step_forgives():
    check = FiniteCheck(PATHS, skips_nonfinite=True)
    bad, good = health(np.nan, 1, 1, 1, skipped=1), health(1, 1, 1, 1)
    for vector in (*[bad] * 99, good, *[bad] * 99):
        check.check(1, vector)
    with pytest.raises(RunError, match="nothing is learned any more"):
        check.check(1, bad)
