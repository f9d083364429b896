"""Data workers that are killed, hang or find no shared memory; none outlives its run (F25)."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxmodels.core import partitioning
from jaxmodels.data.pipeline import PipelineOptions, Stage, train_batches
from tests.data.sources import Slow
from tests.faults import rows
from tests.faults.rows import Rows, example, row
from tests.train import runs
from train import loop
from train.errors import RunError
from train.input import Prefetcher


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Waits for a condition; says whether it came."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def gone(pid: int) -> bool:
    """Whether no such process lives (a zombie does not)."""
    try:
        return "State:\tZ" in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def pids(folder: pathlib.Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """40 rows; at the end, whatever was stopped in reading them is killed."""
    rows.write(tmp_path / "data" / "train.jsonl", [row(i) for i in range(40)])
    yield tmp_path / "data"
    for pid in pids(tmp_path / "data"):
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def config(folder: pathlib.Path) -> ConfigDict:
    return runs.config(
        method="tests.faults.rows", data__dir=str(folder), total_steps=8, batch_size=4,
        checkpoint_every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, ...]]:
    """The curve of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("whole")
    rows.write(root / "data" / "train.jsonl", [row(i) for i in range(40)])
    loop.train(config(root / "data"), root / "run")
    return runs.curve(root / "run")


LATE = r"no batch for \d+ s .*waiting for batch \d from data worker \d of 2 \(pid \d+\)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("kill", r"data worker \d of 2 \(pid \d+\): was ended by SIGKILL"),
        pytest.param("stop", LATE, marks=pytest.mark.long),
        ("hang", LATE),
    ],
    ids=["kill", "stop", "hang"],
)
def test_f25_a_worker_that_dies_or_hangs_ends_the_run_in_one_line_and_a_rerun_is_exact(
    tmp_path: pathlib.Path,
    folder: pathlib.Path,
    whole: dict[int, tuple[float, ...]],
    kind: str,
    said: str,
) -> None:
    (folder / f"{kind}-20").touch()
    found = runs.python(
        "-m", "train.main", "--config=tests/train/toy_config.py:quickstart",
        "--config.method=tests.faults.rows", f"--config.data.dir={folder}",
        "--config.total_steps=8", "--config.batch_size=4", "--config.checkpoint_every=2",
        "--config.data.num_workers=2", "--config.data.timeout_seconds=10",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert re.search(said, found.stderr)
    assert pids(folder) and until(lambda: all(map(gone, pids(folder))))
    (folder / f"{kind}-20").unlink()
    loop.train(config(folder), tmp_path / "run")
    assert runs.curve(tmp_path / "run") == whole


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_f25_the_error_names_the_worker_within_seconds_and_closing_does_not_hang(
    folder: pathlib.Path, kind: str
) -> None:
    stages = [Stage(Rows(folder / "train.jsonl"), example, 4)]
    whole = iter(train_batches(stages, seed=0))
    expected = [next(whole) for _ in range(12)]
    (folder / f"{kind}-20").touch()
    mesh = partitioning.make_mesh()
    workers = PipelineOptions(num_workers=1)
    batches = Prefetcher(train_batches(stages, seed=0, options=workers), mesh, timeout_seconds=10)
    placed = []
    with pytest.raises(RunError) as caught:
        while True:
            placed.append(next(batches))
    (pid,) = pids(folder)
    assert f"worker 0 of 1 (pid {pid})" in str(caught.value)
    with pytest.raises(RunError):
        next(batches)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 15
    assert until(lambda: gone(pid))
    (folder / f"{kind}-20").unlink()
    position = placed[-1].position if placed else None
    rest = Prefetcher(train_batches(stages, seed=0, options=workers), mesh, position)
    for wanted in expected[len(placed) :]:
        np.testing.assert_array_equal(next(rest).batch["input_ids"], wanted["input_ids"])
    rest.close()


SHARED_MEMORY = """
import sys
import numpy as np
from jaxmodels.data.pipeline import PipelineOptions, Stage, train_batches
from tests.data.sources import Numbers
if __name__ == "__main__":
    stages = [Stage(Numbers(8, width=200_000), None, 4)]
    iterator = iter(train_batches(stages, seed=0, options=PipelineOptions(num_workers=1)))
    try:
        while True:
            next(iterator)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    iterator.close()
"""


def test_f25_a_worker_without_shared_memory_says_so(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHARED_MEMORY)
    small = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} {script}"
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"]
    try:
        allowed = subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("needs a /dev/shm of its own (unshare -rm)")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", small],
        capture_output=True, text=True, timeout=120, cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )  # fmt: skip
    assert re.search(r"WorkerError: data worker 0 of 1 \(pid \d+\): .*shared memory", done.stdout)


ORPHANS = """
import multiprocessing, os, signal, sys
from jaxmodels.data.pipeline import PipelineOptions, Stage, train_batches
from tests.data.sources import Slow
if __name__ == "__main__":
    stages = [Stage(Slow(10), None, 4)]
    iterator = iter(train_batches(stages, seed=0, options=PipelineOptions(num_workers=2)))
    next(iterator), next(iterator)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_f25_workers_do_not_outlive_their_run(tmp_path: pathlib.Path, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    done = subprocess.run(
        [sys.executable, str(script), end],
        stdout=subprocess.PIPE, text=True, timeout=60, cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0)
    workers = list(map(int, done.stdout.split()))
    assert len(workers) == 2 and until(lambda: all(map(gone, workers)))


def test_f25_workers_leave_the_signals_of_the_group_to_their_parent() -> None:
    stages = [Stage(Slow(10), None, 2)]
    iterator = iter(train_batches(stages, seed=0, options=PipelineOptions(num_workers=1)))
    next(iterator)
    pid = int(re.search(r"pid (\d+)", iterator.waiting_for())[1])
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    for _ in range(8):
        next(iterator)
    assert iterator.dead_worker() is None
    iterator.close()
    assert until(lambda: gone(pid))
