"""Runs a notebook's cells as plain Python; as a script, for notebooks that start jax themselves.

python -m tests.house.run_notebook PATH JSON, where JSON changes what the first cell sets.
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any


def cells(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def run(path: pathlib.Path, small: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the cells in order, the settings changed to `small`; returns the names at the end."""
    import matplotlib

    matplotlib.use("Agg")
    first, *rest = ("".join(c["source"]) for c in cells(path) if c["cell_type"] == "code")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(first, f"{path.name}[0]", "exec"), names)
    assert small.keys() <= names.keys(), "a setting that the first cell does not have"
    names |= small
    for number, text in enumerate(rest, start=1):
        exec(compile(text, f"{path.name}[{number}]", "exec"), names)
    return names


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
