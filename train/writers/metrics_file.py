"""`metrics.jsonl`, the truth about a run's numbers: a line an object, each step of a split once."""

import json
import math
import os
from collections.abc import Mapping

from etils import epath

from train import storage
from train.errors import UsageError
from train.storage import Say
from train.writers.growing import open_growing


class JsonLines:
    """Appends the numbers of steps; a disk that is full is said once and waited for.

    The lines that did not fit are kept and written, in order, as soon as they do.
    """

    def __init__(self, path: epath.PathLike, step: int, say: Say = print):
        """Opens the file, cut back to the lines up to `step`: later ones will come again.

        Lines that cannot be read (cut off by a kill, damaged by a power cut) are left out.

        Raises:
          UsageError: the file cannot be read or cut back.
        """
        self._path, self._say = epath.Path(path), say
        self._failed = False
        self._last: dict[str, int] = {}  # by split
        try:
            content = self._cut_back(step)
        except Exception as error:
            raise UsageError(f"{path} cannot be opened: {storage.describe(error)}") from error
        self._file = open_growing(path, content, say)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite become null: JSON has no word for them.

        A step that its split has already (an evaluation made again after a kill) is left out.
        """
        if step <= self._last.get(split, -1):
            return
        self._last[split] = step
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._append((json.dumps({"step": step, "split": split} | finite) + "\n").encode())

    def flush(self) -> None:
        """Makes the lines so far outlive a crash of the machine, at once or soon."""
        self._append(b"", then_flush=True)

    def close(self) -> None:
        """Writes what did not fit before."""
        try:
            self._file.close()
        except OSError as error:
            self._say(
                f"warning: the last lines of {self._path} are lost ({storage.describe(error)})"
            )

    def _append(self, data: bytes, then_flush: bool = False) -> None:
        try:
            self._file.append(data)
            if then_flush:
                self._file.flush()
        except OSError as error:
            if not self._failed:
                self._say(
                    f"warning: {self._path} cannot be written ({storage.describe(error)}); "
                    f"training goes on, the lines are kept and tried again"
                )
            self._failed = True
            return
        if self._failed:
            self._say(f"{self._path} is written again, no line is missing")
        self._failed = False

    def _cut_back(self, step: int) -> bytes:
        """Leaves the lines up to `step` in the file; returns them."""
        if not self._path.exists():
            return b""
        content = self._path.read_bytes()
        lines = content.splitlines(keepends=True)
        kept = []
        for line in lines:
            record = _record(line)
            if record is None or not self._last.get(record[1], -1) < record[0] <= step:
                continue
            self._last[record[1]] = record[0]
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        wanted = b"".join(kept)
        if content.startswith(wanted):
            if len(content) != len(wanted) and not storage.is_remote(self._path):
                os.truncate(self._path, len(wanted))  # needs no space on the disk
        else:
            storage.write(self._path, wanted)
        return wanted


def _record(line: bytes) -> tuple[int, str] | None:
    """The step and the split of a line; None where it is not a whole record."""
    try:
        record = json.loads(line)
        return int(record["step"]), str(record["split"])
    except (ValueError, KeyError, TypeError):
        return None
