"""What three real processes agree on, and that none is left waiting when another one fails."""

import json
import shutil

import pytest

from tests.multiprocess import launcher
from tests.train import runs
from train import distributed
from train.errors import RunError, UsageError

SCRIPT = ("-m", "tests.multiprocess.agreements")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    group = launcher.run(3, tmp_path_factory.mktemp("three"), *SCRIPT)
    lines = [process.text.splitlines() for process in group.processes]
    return [json.loads(next(t for t in text if t.startswith('{"gather"'))) for text in lines]


def everywhere(found, name):
    return [one[name] for one in found]


def test_values_travel_whole(found):
    wanted = [{"index": 0, "text": ""}, {"index": 1, "text": "é"}, {"index": 2, "text": "éé"}]
    assert everywhere(found, "gather") == [wanted] * 3
    assert everywhere(found, "first") == [{"from": 0, "none": None}] * 3
    assert everywhere(found, "together") == ["from 0", "from 1", "from 2"]
    assert everywhere(found, "guarded") == [3, 3, 3]
    assert everywhere(found, "same") == [None] * 3


def test_what_fails_on_process_0_fails_everywhere(found):
    assert everywhere(found, "first usage") == [
        ["UsageError", "no bucket"],
        *[["UsageError", "process 0: no bucket"]] * 2,
    ]
    assert everywhere(found, "first run")[1] == ["RunError", "process 0: disk gone"]
    assert everywhere(found, "first other") == [
        ["KeyError", "'x'"],
        *[["RunError", "process 0: KeyError: 'x'"]] * 2,
    ]
    assert everywhere(found, "first elsewhere") == ["from 0"] * 3


def test_what_fails_on_one_process_fails_everywhere(found):
    usage, own = everywhere(found, "together usage"), ["UsageError", "no file"]
    other = ["UsageError", "process 1: no file"]
    assert usage == [other, own, other]
    assert everywhere(found, "together two") == [
        ["RunError", "process 1: KeyError: 'x'"],
        *[["KeyError", "'x'"]] * 2,
    ]


def test_what_differs_is_named_with_its_processes(found):
    kind, text = everywhere(found, "differ")[0]
    assert kind == "UsageError" and everywhere(found, "differ") == [[kind, text]] * 3
    assert "config.seed is 0 on process 0 and 1, 1 on process 2" in text
    assert "config.only is absent on process 0, x on process 1 and 2" in text
    assert "config.a" not in text and "source code" not in text


def test_a_workdir_on_a_disk_of_its_own_is_refused_on_every_host(found):
    assert everywhere(found, "shared") == [None] * 3
    first, *others = everywhere(found, "not shared")
    assert first[1].startswith("process 1: --workdir=")
    for kind, text in others:
        assert kind == "UsageError" and "is not the same folder on every host" in text


def test_f29_other_source_code_on_one_process_ends_all(tmp_path):
    edited = tmp_path / "edited"
    for folder in ("train", "configs", "jaxmodels", "kernels_pallas", "tests"):
        shutil.copytree(
            runs.ROOT / folder, edited / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    with (edited / "train" / "clock.py").open("a") as file:
        file.write("# an edit that one host did not get\n")
    with launcher.started(2, tmp_path, *SCRIPT, roots={1: edited}) as group:
        assert group.wait() == [2, 2], group.logs()
        for process in group.processes:
            assert "source code is" in process.error and "Traceback" not in process.text


def test_one_process_needs_nobody():
    assert distributed.first(lambda: (1, 2)) == (1, 2)
    assert distributed.together(lambda: "x") == "x"
    assert distributed.gather([None]) == [[None]]
    distributed.same_everywhere("config", {"seed": 1})
    with pytest.raises(UsageError, match="^own$"):
        distributed.first(lambda: (_ for _ in ()).throw(UsageError("own")))


def test_a_broken_connection_is_a_peer_that_has_gone(monkeypatch):
    broken = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\n more")
    assert distributed.lost_peer(broken) is None  # a single process has lost nobody
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    error = distributed.lost_peer(broken)
    assert isinstance(error, RunError) and "resume the run" in str(error)
    assert distributed.lost_peer(ValueError("shapes differ")) is None
