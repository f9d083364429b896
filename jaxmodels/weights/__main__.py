"""Shows what a weights file holds: `python -m jaxmodels.weights inspect FILE`."""

import argparse
import math
import sys
from collections.abc import Sequence

from jaxmodels.weights.files import read
from jaxmodels.weights.tensor_file import WeightsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints name, shape and dtype of every tensor, and totals; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxmodels.weights", description=__doc__)
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("file", help="a .safetensors, .index.json or torch.save file, or a folder")
    chosen = parser.parse_args(arguments)
    try:
        tensors = read(chosen.file)
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 1
    width = max(map(len, tensors), default=0)
    sizes = {name: math.prod(tensors.shape(name)) for name in tensors}
    for name in tensors:
        print(f"{name:{width}}  {tensors.dtype(name)!s:10}  {list(tensors.shape(name))}")
    size = sum(sizes[name] * tensors.dtype(name).itemsize for name in tensors)
    print(f"{len(tensors)} tensors, {sum(sizes.values()):,} values, {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
