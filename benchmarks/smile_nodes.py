"""Starts the nodes of `smile_all2all --measure`, waits for them, and puts together what they found.

A collective whose peer is gone waits for ever, so every wait here has an end: a group that hangs,
or loses a node, is killed and said to have failed; the cases that all nodes had written stay.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import smile_counters
from benchmarks.smile_exchange_worker import FORMS, Job
from benchmarks.smile_links import Links

ROOT = Path(__file__).parents[1]
PORT = 29500  # of namespaces that nobody else is in
# Not -m: `make bench` runs every module that can be run.
START = "import sys; from benchmarks.smile_exchange_worker import main; "
START += "main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])"
_GRACE = 5.0  # seconds for the others once a node has failed


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a group.

    Attributes:
      rows: a row a case and form, see `rows`.
      failed: None, or why not all cases are there.
      facts: what the nodes told of themselves: the load at each case, the congestion control.
    """

    rows: list[dict[str, Any]]
    failed: str | None
    facts: dict[str, Any]


def run(links: Links, job: Job) -> Outcome:
    """Runs a job on nodes that are joined already."""
    with tempfile.TemporaryDirectory(prefix="smile-nodes") as place:
        folder = Path(place)
        with started(links, job, folder) as group:
            failed = wait(group, job.timeout_s)
        if failed:
            failed += f"; the end of their logs:\n{logs(folder)}"
        records = [_lines(folder / f"{node}.jsonl") for node in range(job.nodes)]
    cases = list(zip(*records, strict=False))  # what all nodes wrote
    facts: dict[str, Any] = {"load": [round(max(r["load"] for r in case), 2) for case in cases]}
    if cases:
        facts["congestion_control"] = cases[0][0]["congestion_control"]
    return Outcome([row for case in cases for row in rows(case)], failed, facts)


@contextlib.contextmanager
def started(links: Links, job: Job, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts a process a node; kills those that are left in the end."""
    group: list[subprocess.Popen[bytes]] = []
    try:
        for node in range(job.nodes):
            with (folder / f"{node}.log").open("wb") as log:
                process = subprocess.Popen(
                    command(links, job, node, folder),
                    cwd=ROOT,
                    env=os.environ | environment(job),
                    stdin=subprocess.PIPE,  # closed when this process ends, which ends the node
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            group.append(process)
        yield group
    finally:
        for process in group:
            _kill(process)


def command(links: Links, job: Job, node: int, folder: Path) -> list[str]:
    """Returns what a node runs."""
    coordinator = f"{links.address(0)}:{PORT}"
    told = json.dumps(dataclasses.asdict(job))
    out = str(folder / f"{node}.jsonl")
    return links.inside(node, [sys.executable, "-c", START, told, coordinator, str(node), out])


def environment(job: Job) -> dict[str, str]:
    """Returns the variables of a node: m simulated devices, and nothing of a cluster around."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={job.devices}"]
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONUNBUFFERED": "1"}


def wait(group: Sequence[subprocess.Popen[bytes]], seconds: float) -> str | None:
    """Waits until all have ended; returns None, or what went wrong.

    Args:
      group: a process a node.
      seconds: to wait for; once a node has failed the others get a few more only.
    """
    deadline, broken = time.monotonic() + seconds, None
    while None in [process.poll() for process in group]:  # a list: each one is asked
        bad = {i: p.returncode for i, p in enumerate(group) if p.returncode}
        if bad and broken is None:
            broken = bad
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    hung = [i for i, process in enumerate(group) if process.poll() is None]
    bad = broken or {i: p.returncode for i, p in enumerate(group) if p.returncode}
    if bad:
        text = ", ".join(f"node {i} ended with status {status}" for i, status in bad.items())
        return f"{text}; {len(hung)} others were killed" if hung else text
    return f"nodes {hung} had not ended after {seconds:g} s and were killed" if hung else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdin.close()


def logs(folder: Path, characters: int = 600) -> str:
    """Returns the end of every log."""
    found = sorted(folder.glob("*.log"))
    ends = [path.read_text(errors="replace")[-characters:].strip() for path in found]
    return "\n".join(f"--- {path.stem}: {end}" for path, end in zip(found, ends, strict=True))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a node; one that was cut short does not count."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def rows(case: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row a form of one case, from the records of all nodes.

    A run takes as long as its slowest node: one node is done once its own data has come, while
    others may still wait for what it has sent. `gain` is the median, over rounds, of the flat
    form's time by this one's: above 1 this form is faster. `gain_least` is the same of the 10th
    percentiles, the runs least disturbed. Counters are means over nodes.
    """
    slowest = {form: np.max([record["seconds"][form] for record in case], axis=0) for form in FORMS}
    found = []
    for form, seconds in slowest.items():
        lower, median, upper = (1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))).tolist()
        opened = case[0].get("connections")
        row = {"kind": case[0]["kind"], "size": case[0]["size"], "form": form}
        row |= {"median_ms": median, "lower_ms": lower, "upper_ms": upper}
        row |= {"rounds": len(seconds), "gain": float(np.median(slowest["flat"] / seconds))}
        least = {name: np.quantile(slowest[name], 0.1) for name in ("flat", form)}
        row["gain_least"] = float(least["flat"] / least[form])
        row |= {"connections_opened": opened[form] if opened else None}
        found.append(row | smile_counters.mean(record["counters"][form] for record in case))
    return found
