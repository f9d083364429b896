"""Command: check parity files and print one line each.

    python -m tests.parity FILE...

A line is `ok vcc/compress_b4 1.2e-07` (largest relative error) or `FAIL vcc/name 3.1e-02 (array)`.
The exit status is 0 only if every file passes; without files it is 2.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # imported by a test, this must not reach the processes of other tests
    # The references are float32 on CPU; accelerators multiply in reduced precision by default.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Each program runs once on a few numbers: compiling it is all that takes time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

from .fixtures import check  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Check the files named by `arguments` and return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m tests.parity FILE... (.npz or .json parity files)")
        return 2
    passed = True
    for argument in arguments:
        verdict = check(Path(argument))
        print(verdict, flush=True)
        passed &= verdict.ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
