"""The first steps of the quickstart against recorded losses: nothing about training has shifted.

One machine gives the same losses bit by bit; another CPU rounds differently. Measured: a start
perturbed by 1e-5 of each parameter (a hundred roundings) moves no loss of these steps by more than
2e-4 of itself, one perturbed by 1e-6 by 2e-5. RTOL leaves room above that.
"""

import jax
import numpy as np
import pytest

from tests.golden import record

RTOL = 1e-3

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> tuple[str, list[float], int]:
    """Hash of the text, losses, and programs compiled; the data stays in pytest's cache."""
    folder = request.config.rootpath / ".pytest_cache" / "golden-data"
    config, task = record.quickstart(str(folder))
    text = record.topics_sha256(task)
    if text not in record.stored():
        known = ", ".join(entry["python"] for entry in record.stored().values())
        pytest.skip(f"no losses for this Python's text (there are some for {known}): "
                    "python -m tests.golden.record adds them")  # fmt: skip
    return text, *record.losses(config, task)


def test_quickstart_losses_are_those_recorded(run: tuple[str, list[float], int]) -> None:
    text, found, _ = run
    entry = record.stored()[text]
    told = f"recorded with jax {entry['jax']}, this is {jax.__version__}"
    np.testing.assert_allclose(found, entry["losses"], rtol=RTOL, err_msg=told)


def test_quickstart_learns_within_its_first_stage(run: tuple[str, list[float], int]) -> None:
    losses = run[1]
    assert losses[0] == pytest.approx(np.log(16), rel=0.1)  # starts from guessing among 16 values
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_one_shape_of_batch_compiles_one_program(run: tuple[str, list[float], int]) -> None:
    assert run[2] == 1
