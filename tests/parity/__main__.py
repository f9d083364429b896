"""Command: check parity files and print one line each.

    python -m tests.parity FILE...

A line is `ok vcc/compress_b4 1.2e-07` (largest relative error) or `FAIL vcc/name 3.1e-02 (array)`.
The exit status is 0 only if every file passes; without files it is 2.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .fixtures import check, devices_named

if __name__ == "__main__":  # imported by a test, this must not reach the processes of other tests
    # The references are float32 on CPU; accelerators multiply in reduced precision by default.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Each program runs once on a few numbers: compiling it is all that takes time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib").startswith("0.10.") and "fusion_emitters" not in flags:
        flags += " --xla_cpu_use_fusion_emitters=false"  # the earlier emitter: half the time
    # Adapters import jax when the first file is checked: until then devices can be simulated.
    devices = max(map(devices_named, sys.argv[1:]), default=1)
    if devices > 1 and "host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = flags.strip()


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
