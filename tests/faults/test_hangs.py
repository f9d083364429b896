"""Fault F32: a run that makes no progress prints its stacks and ends."""

import subprocess
import sys
import time

from tests.train import runs
from train.watchdog import Watchdog

HANGING = """
import threading, time
from train.watchdog import Watchdog

def a_collective_that_never_ends():
    time.sleep(60)

with Watchdog(0.5, lambda: "process 3, last step started: 17"):
    a_collective_that_never_ends()
"""


def test_f32_a_hang_prints_the_stacks_and_exits_with_1():
    began = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", HANGING], cwd=runs.ROOT, capture_output=True, text=True, timeout=50
    )
    assert time.monotonic() - began < 30
    assert found.returncode == 1
    first = found.stderr.splitlines()[0]
    assert first.startswith("error: no progress for 0.5 s (process 3, last step started: 17)")
    assert "a_collective_that_never_ends" in found.stderr


def test_f32_progress_keeps_the_watchdog_quiet_and_it_leaves_no_thread():
    with Watchdog(0.5) as watchdog:
        for _ in range(10):
            time.sleep(0.1)
            watchdog.beat()
    assert not watchdog._thread.is_alive()


def test_f32_a_step_that_hangs_ends_the_run(tmp_path):
    script = (
        "import time; from train import cli, compiled, main\n"
        "plain, calls = compiled.PerShape.__call__, []\n"
        "def step(self, *arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: time.sleep(60)\n"
        "    return plain(self, *arguments)\n"
        "compiled.PerShape.__call__ = step\n"
        "cli.run(main.main)\n"
    )
    found = runs.python(
        "-c",
        script,
        "--config=tests/train/toy_config.py:quickstart",
        f"--workdir={tmp_path}/run",
        "--config.watchdog_seconds=10",  # a busy machine may take seconds to begin a step
    )
    assert found.returncode == 1, found.stderr
    assert "no progress for 10 s (process 0, last step started: 3)" in found.stderr
    assert "most recent call first" in found.stderr
