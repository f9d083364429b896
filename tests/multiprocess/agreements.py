"""Run by test_agreements.py in every process: joins the others, agrees on things, prints JSON.

python -m tests.multiprocess.agreements FLAGS...
"""

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from train import cli, distributed, storage
from train.errors import RunError, UsageError


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns, or the type and text of its error."""
    try:
        return function()
    except Exception as error:
        return [type(error).__name__, str(error)]


def failing(error: Exception, *indices: int) -> Callable[[], Any]:
    """A function that fails on some processes and names the process elsewhere."""

    def function() -> str:
        if jax.process_index() in indices:
            raise error
        return f"from {jax.process_index()}"

    return function


def main(argv: list[str]) -> None:
    """Every agreement, one after the other."""
    command = cli.parse(argv, cli.DISTRIBUTED, "agreements FLAGS")
    cli.start_processes(command)
    cli.start_processes(command)  # joined already: nothing happens
    first, together, same = distributed.first, distributed.together, distributed.same_everywhere
    index = jax.process_index()
    found = {
        "gather": distributed.gather({"index": index, "text": "é" * index}),
        "first": first(lambda: {"from": index, "none": None}),
        "first usage": outcome(lambda: first(failing(UsageError("no bucket"), 0))),
        "first run": outcome(lambda: first(failing(RunError("disk gone"), 0))),
        "first other": outcome(lambda: first(failing(KeyError("x"), 0))),
        "first elsewhere": outcome(lambda: first(failing(KeyError("x"), 1, 2))),
        "together": together(failing(KeyError("x"))),
        "together usage": outcome(lambda: together(failing(UsageError("no file"), 1))),
        "together two": outcome(lambda: together(failing(KeyError("x"), 1, 2))),
        "same": outcome(lambda: same("config", {"seed": 1, "sizes": [1, 2]})),
        "differ": outcome(
            lambda: same("config", {"seed": index // 2, "a": 1} | ({"only": "x"} if index else {}))
        ),
        "guarded": outcome(guarded),
        "shared": outcome(lambda: storage.check_shared(first(tempfile.mkdtemp))),
        "not shared": outcome(lambda: storage.check_shared(tempfile.mkdtemp(), patience=0.5)),
    }
    print(json.dumps(found), flush=True)
    same("config", {"seed": 1})


def guarded() -> int:
    """Agreements are made inside the loop too, where nothing else may move to a device."""
    with jax.transfer_guard("disallow"):
        return len(distributed.gather(None))


if __name__ == "__main__":
    cli.run(lambda _: main(sys.argv[1:]))
