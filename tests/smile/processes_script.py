"""One process of a run: `train.main` on each command line of those between `--then`, in turn."""

import itertools
import sys
from collections.abc import Sequence

from train import cli, main


def each(words: Sequence[str]) -> None:
    """Trains them; the flags that tell of the other processes stand behind the last `--then`."""
    *cases, joining = (
        list(part) for then, part in itertools.groupby(words, "--then".__eq__) if not then
    )
    for case in cases:
        main.main([*case, *joining])


if __name__ == "__main__":
    cli.run(each)
