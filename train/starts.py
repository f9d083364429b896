"""`starts.jsonl`: what each start of a run ran with, so that a change of curve can be explained."""

import datetime
import json
from collections.abc import Sequence

from etils import epath

from train import distributed, storage
from train.storage import Say
from train.writers.growing import open_growing

FILE = "starts.jsonl"


def record_start(
    workdir: epath.PathLike,
    step: int,
    devices: Sequence[str],
    processes: int = 1,
    say: Say = print,
) -> None:
    """Appends one line; a folder that cannot take it is said, not raised.

    Args:
      workdir: of the run.
      step: continued from.
      devices: in words, one a kind: `8 x TPU v5 lite`.
      processes: that the run has.
      say: takes the warning.
    """
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "devices": list(devices),
        "processes": processes,
        "versions": distributed.versions(),
    }
    path = storage.folder(workdir) / FILE
    try:
        before = path.read_bytes() if storage.is_remote(path) and path.exists() else b""
        file = open_growing(path, before, say)
        file.append((json.dumps(line) + "\n").encode())
        file.close()
    except Exception as error:
        say(f"warning: {path} cannot be written ({storage.describe(error)})")
