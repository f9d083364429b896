"""Who holds a folder, and when a lock that lies there means nothing any more."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from tests.train.cloud import cloud  # noqa: F401  (a fixture)
from train import lock
from train.errors import UsageError
from train.lock import Holder, Lock


@pytest.fixture
def hasty(monkeypatch):
    """Seconds become hundredths."""
    for name in ("BEAT", "STALE", "_LOOK", "_SETTLE"):
        monkeypatch.setattr(lock, name, getattr(lock, name) / 100)


def held(workdir, **changes):
    """Leaves a lock of another holder in the folder; returns it."""
    holder = dataclasses.replace(lock._myself(), token="theirs", **changes)
    epath.Path(workdir, lock.FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def until(condition, seconds=10.0):
    """Waits for `condition()`; fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def heartbeats():
    return [t for t in threading.enumerate() if t.name == "lock heartbeat"]


def test_it_is_given_back_and_leaves_no_thread(tmp_path):
    with Lock(tmp_path):
        record = json.loads((tmp_path / lock.FILE).read_text())
        assert record["pid"] == os.getpid() and record["host"] and record["since"]
        assert len(heartbeats()) == 1
    assert list(tmp_path.iterdir()) == [] and heartbeats() == []


def test_it_is_given_back_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError), Lock(tmp_path):
        raise RuntimeError("the run")
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_cannot_take_it_twice(tmp_path):
    with Lock(tmp_path):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            Lock(tmp_path).__enter__()
        assert len(heartbeats()) == 1
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # above every process number
        {"started": "1"},  # our own number, given anew
    ],
)
def test_a_dead_process_of_this_machine_is_seen_at_once(tmp_path, changes):
    holder = held(tmp_path, **changes)
    said = []
    with Lock(tmp_path, said.append):
        pass
    assert said == [f"taking over the lock of {holder}: its process is gone"]


def test_a_process_that_nobody_reaped_is_dead(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    started = lock._started(process.pid)
    process.stdin.close()
    until(lambda: lock._started(process.pid) == "")
    held(tmp_path, pid=process.pid, started=started)
    with Lock(tmp_path):
        pass
    process.wait()


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere"},
        {"kernel": "same name, other machine", "pid": 1},
        {"kernel": "same machine, process numbers of a container", "pid": 2**22 + 1},
    ],
)
def test_a_holder_elsewhere_is_watched_and_then_taken_for_dead(tmp_path, hasty, changes):
    holder = held(tmp_path, **changes)
    said = []
    start = time.monotonic()
    with Lock(tmp_path, said.append):
        assert json.loads((tmp_path / lock.FILE).read_text())["token"] != "theirs"
    assert time.monotonic() - start >= 0.5
    assert "for a sign of life" in said[0]
    assert said[1:] == [f"taking over the lock of {holder}: it shows no sign of life"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_holder_elsewhere_that_shows_life_is_respected(tmp_path, cloud, hasty, remote):  # noqa: F811
    workdir = epath.Path("gs://here/run" if remote else tmp_path)
    held(workdir, host="elsewhere")

    def beat(said):
        if remote:
            held(workdir, host="elsewhere", time=1.0)
        else:
            os.utime(workdir / lock.FILE, ns=(1, time.time_ns() + 10**9))

    with pytest.raises(UsageError, match="in use by another run: host elsewhere, process"):
        Lock(workdir, beat).__enter__()
    assert json.loads((workdir / lock.FILE).read_text())["token"] == "theirs"


def test_a_lock_that_is_given_back_while_watched_is_free(tmp_path, hasty):
    held(tmp_path, host="elsewhere")
    said = []

    def say(text):
        said.append(text)
        (tmp_path / lock.FILE).unlink()

    with Lock(tmp_path, say):
        pass
    assert len(said) == 1


def test_a_lock_from_long_ago_is_not_waited_for(tmp_path):
    held(tmp_path, host="elsewhere")
    os.utime(tmp_path / lock.FILE, (1, 1))
    start = time.monotonic()
    with Lock(tmp_path):
        pass
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_cannot_be_read_is_watched_too(tmp_path, hasty, text):
    (tmp_path / lock.FILE).write_text(text)
    said = []
    with Lock(tmp_path, said.append):
        pass
    assert "a holder that cannot be read" in said[0] and "no sign of life" in said[1]


def test_the_file_shows_life_while_it_is_held(tmp_path, cloud, hasty):  # noqa: F811
    with Lock(tmp_path):
        first = (tmp_path / lock.FILE).stat().st_mtime_ns
        until(lambda: (tmp_path / lock.FILE).stat().st_mtime_ns > first)
    with Lock("gs://here/run"):
        path = epath.Path("gs://here/run") / lock.FILE
        text = path.read_text()
        until(lambda: path.read_text() != text)
    assert not path.exists()


def test_a_lock_that_was_removed_is_restored_with_a_line(tmp_path, hasty):
    said = []
    with Lock(tmp_path, said.append) as held_lock:
        (tmp_path / lock.FILE).unlink()
        until(lambda: (tmp_path / lock.FILE).exists())
        until(lambda: len(said) == 1)
        assert held_lock.lost is None
    assert "was removed" in said[0] and list(tmp_path.iterdir()) == []


def test_a_lock_that_another_run_replaced_is_said_once_and_left_to_it(tmp_path, hasty):
    said = []
    with Lock(tmp_path, said.append) as ours:
        held(tmp_path, host="elsewhere")
        until(lambda: ours.lost)
        until(lambda: not heartbeats())
    assert len(said) == 1 and "was replaced by another run: host elsewhere" in said[0]
    assert json.loads((tmp_path / lock.FILE).read_text())["token"] == "theirs"


def test_beats_that_cannot_be_written_are_said_once(tmp_path, hasty, monkeypatch):
    said = []

    def broken(*_):
        raise OSError(28, "No space left on device")

    with Lock(tmp_path, said.append):
        monkeypatch.setattr(os, "utime", broken)
        until(lambda: said)
        time.sleep(5 * lock.BEAT)
    assert len(said) == 1 and "cannot be refreshed" in said[0]


def test_of_many_that_start_at_once_one_wins(tmp_path):
    """Threads of one process stand for processes: the guard works between open files."""
    taken, refused, barrier = [], [], threading.Barrier(8)

    def take():
        mine = Lock(tmp_path, lambda _: None)
        barrier.wait()
        try:
            taken.append(mine.__enter__())
        except UsageError as error:
            refused.append(str(error))

    held(tmp_path, pid=2**22 + 1)
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    taken[0].__exit__()


def test_where_proc_is_absent_process_numbers_alone_decide(monkeypatch):
    me = Holder("a", "host", "", os.getpid(), "", "now", 0.0)
    assert lock._alive(me, me) is True
    assert lock._alive(dataclasses.replace(me, pid=2**22 + 1), me) is False
    assert lock._alive(dataclasses.replace(me, host="other"), me) is None
