"""Two processes write one checkpoint and agree about it; any other number reads it."""

import pytest

from tests.multiprocess import launcher
from tests.train import checkpoint_cases as cases
from train.checkpoint import Checkpoints
from train.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind, having read what one had written."""
    folder = tmp_path_factory.mktemp("two")
    cases.run(folder / "alone", range(1, 3), parts={"frozen": cases.frozen()})
    script = ["-m", "tests.train.checkpoint_processes_script", str(folder)]
    group = launcher.run(2, folder / "logs", *script, devices=2)
    assert all("all of it held" in process.text for process in group.processes)
    return folder, group


def plan():
    return cases.plan(cases.state(0, frozen=cases.frozen()))


def test_two_processes_agree_on_every_save_failure_and_restore(folder):
    said = folder[1][0].text
    assert "checkpoint 2 is damaged: progress/process_1_of_2.json is missing" in said
    assert "is damaged" not in folder[1][1].text  # process 0 speaks
    assert "Traceback" not in said + folder[1][1].text


def test_one_process_continues_what_two_saved_at_one_place_in_the_data(folder):
    with Checkpoints(folder[0] / "equal") as saved:
        found = saved.restore(plan())
    assert found.progress == {"position": [2, 0], "who": 0}
    cases.assert_same(found.state, cases.state(2, frozen=cases.frozen()))


def test_one_process_refuses_what_two_saved_at_different_places(folder):
    with Checkpoints(folder[0] / "apart") as saved:
        with pytest.raises(UsageError, match="saved by 2 processes, each at its own place"):
            saved.restore(plan())
