"""Evaluates a run in several processes and prints a digest of its weights, for test_equal_one.py.

python -m tests.multiprocess.weights --workdir=DIR --step=N FLAGS...
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmodels.core import params as params_lib
from train import cli, evaluate
from train.trained import open_run


def digests(params: Mapping[str, Any]) -> dict[str, str]:
    """{path: digest of all values}, wherever their shards lie."""
    found = {}
    for path, leaf in sorted(params_lib.flatten(params).items()):
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        found[path] = hashlib.sha256(whole.tobytes()).hexdigest()
    return found


def main(argv: list[str]) -> None:
    """The evaluation, then the weights."""
    evaluate.main(argv)
    command = cli.parse(argv, evaluate.FLAGS, evaluate.USAGE)
    run = open_run(command.flags["workdir"], int(command.flags["step"]), command.overrides)
    with jax.set_mesh(run.mesh):
        print(json.dumps({"digests": digests(run.params)}), flush=True)


if __name__ == "__main__":
    cli.run(lambda _: main(sys.argv[1:]))
