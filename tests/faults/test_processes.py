"""Faults of runs of several processes: signals, deaths, late and missing members, wrong starts."""

import signal

import numpy as np
import pytest

from tests.multiprocess import launcher, reference
from tests.train import runs, toy_config
from train.loop import train

pytestmark = pytest.mark.slow
SLOW = "--slow=0.1"  # the run shall not be over when a signal has been agreed on


def started(folder, *flags, **settings):
    """The run of two processes that `reference.two` is, with `flags`, in folder/run."""
    command = (*reference.MEMBER, f"--workdir={folder}/run", *flags)
    return launcher.started(2, folder / "logs", *command, **settings, **reference.CACHE)


def stopped_at(group):
    """The step at which process 0 says that it stopped."""
    lines = [line for line in group[0].text.splitlines() if "stopping at step" in line]
    assert len(lines) == 1, group.logs()
    return int(lines[0].rsplit(" ", 1)[1])


def no_traces(group):
    return not any("Traceback" in p.text or "stack trace" in p.text for p in group.processes)


def continue_alone(workdir, whole):
    """One process goes on from what two have saved, and ends like a run never stopped."""
    train(runs.config(**reference.SETTINGS), workdir, toy_config.FIELDS)
    found, wanted = runs.curve(workdir), runs.curve(whole)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return reference.workdir(reference.two(tmp_path_factory))


@pytest.mark.long
def test_f02_sigterm_to_one_of_two_stops_both_at_one_step_and_reruns_are_bit_equal(whole, tmp_path):
    with started(tmp_path, SLOW, extra={1: ["--signal=step-3:SIGTERM"]}) as group:
        assert group.wait() == [143, 143], group.logs()
    first = stopped_at(group)
    assert 3 <= first < 20 and runs.steps_saved(tmp_path / "run")[-1] == first
    assert runs.is_whole(tmp_path / "run", first) and no_traces(group)
    # again, before the first step: nothing has been agreed on yet when the signal comes
    with started(tmp_path, SLOW, extra={0: ["--signal=compile:SIGINT"]}) as group:
        assert group.wait() == [143, 143], group.logs()
    assert first < stopped_at(group) <= first + 3 and no_traces(group)
    with started(tmp_path) as group:
        assert group.wait() == [0, 0], group.logs()
    assert runs.curve(tmp_path / "run") == runs.curve(whole)
    names = ("step", "loss", "accuracy")
    found, wanted = (
        [[r[name] for name in names] for r in runs.lines(w, "valid")]
        for w in (tmp_path / "run", whole)
    )
    assert found == wanted


@pytest.mark.long
def test_f03_a_second_sigterm_during_the_save_harms_no_step(whole, tmp_path):
    signals = ["--signal=save-2:SIGTERM", "--signal=stopping:SIGTERM"]
    with started(tmp_path, SLOW, "--hold=2", extra={1: signals}) as group:
        assert group[1].wait(90) == 143 and "leaving at once" in group[1].text, group.logs()
        assert group[0].wait(90) in (1, 134), group.logs()
    saved = runs.steps_saved(tmp_path / "run")
    assert [step for step in saved if runs.is_whole(tmp_path / "run", step)] == [6], saved
    continue_alone(tmp_path / "run", whole)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_f31_a_killed_process_ends_the_other_and_the_run_resumes(victim, whole, tmp_path):
    # its call 16 is step 14 (an evaluation is two): step 12 was saved after 6 was whole
    extra = {victim: ["--signal=step-16:SIGKILL"]}
    with started(tmp_path, SLOW, extra=extra) as group:
        assert group[victim].wait(90) == 128 + signal.SIGKILL, group.logs()
        other = group[1 - victim]
        assert other.wait(10 + 15) in (1, 134), group.logs()  # heartbeat_seconds, and some air
    if other.popen.returncode == 1:
        assert f"process {other.index} lost another process of this run" in other.error
    assert runs.is_whole(tmp_path / "run", 6)
    continue_alone(tmp_path / "run", whole)


def test_f30_a_process_0_that_is_not_there(tmp_path):
    short = "--config.distributed.timeout_seconds=2"
    port = launcher.free_port()
    with started(tmp_path, short, leave_out=[0], port=port) as group:
        assert group.wait() == [1]
    (lonely,) = group.processes
    assert f"did not find process 0 at 127.0.0.1:{port} within 2 s" in lonely.error
    assert no_traces(group) and not (tmp_path / "run").exists()


def test_f30_a_process_that_never_comes(tmp_path):
    short = "--config.distributed.timeout_seconds=2"
    with started(tmp_path, short, leave_out=[1]) as group:
        assert group.wait() == [1]
    (lonely,) = group.processes
    assert "process 1 of 2 did not come to process 0 at 127.0.0.1:" in lonely.error
    assert "within 2 s" in lonely.error
    assert no_traces(group) and not (tmp_path / "run").exists()


@pytest.mark.long
def test_f30_flags_that_contradict_one_another_are_wrong_usage(tmp_path):
    bad = {0: ["--process_id=2"], 1: ["--coordinator_address=nowhere"]}
    with started(tmp_path, extra=bad) as group:
        assert group.wait() == [2, 2]
    assert "process_id=2 with num_processes=2: accepted is 0 to" in group[0].error
    assert "coordinator_address=nowhere: accepted is HOST:PORT" in group[1].error


def test_f29_different_configs_end_all_processes_naming_the_fields(tmp_path):
    extra = {1: ["--config.optimizer.learning_rate=0.5", "--config.mesh.device=1"]}
    with started(tmp_path, extra=extra) as group:
        assert group.wait() == [2, 2], group.logs()
    for process in group.processes:
        assert "config.optimizer.learning_rate is 0.01 on process 0, 0.5 on" in process.error
        assert "config.mesh.device is -1 on process 0, 1 on process 1" in process.error
        assert "compiled" not in process.text
    assert no_traces(group) and not (tmp_path / "run" / "config.json").exists()


def test_f29_a_mesh_of_more_devices_than_exist_ends_all_processes(tmp_path):
    with started(tmp_path, "--config.mesh.device=4", "--config.mesh.node=2") as group:
        assert group.wait() == [2, 2], group.logs()
    for process in group.processes:
        assert "mesh.device=4 does not divide the 2 devices" in process.error
    assert no_traces(group)
