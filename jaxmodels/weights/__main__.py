"""Shows and converts weights files: `python -m jaxmodels.weights inspect|convert`."""

import argparse
import collections
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.weights import converted, families, files
from jaxmodels.weights.safetensors_file import save_safetensors
from jaxmodels.weights.tensor_file import TensorFile, WeightsError

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SHOWN = 10  # findings in an error
_FILE = "a .safetensors, .index.json, torch.save, TorchScript or .npz file, or a model folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 where a file is refused (2: wrong usage).

    Errors are one line on stderr; of many findings the first ones are shown and the rest counted.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "inspect":
            return _inspect(chosen)
        try:
            converted.check_absent(pathlib.Path(chosen.out), chosen.force)
        except WeightsError as error:
            print(error, file=sys.stderr)
            return 2
        return _convert(chosen)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except WeightsError as error:
        summary = str(error).split("\n")[0]
        more = len(error.problems) - _SHOWN
        shown = [summary, *error.problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        print("; ".join(shown), file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or chosen.file}: {error.strerror or error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxmodels.weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print what a file or converted folder holds")
    inspect.add_argument("file", help=f"{_FILE}, or a folder that convert wrote")
    convert = commands.add_parser(
        "convert",
        help="published weights -> a checkpoint for --config.init_from, or back",
        description="Converts published weights to an orbax checkpoint of our parameter tree that "
        "--config.init_from takes; and such a checkpoint back to published names.",
    )
    convert.add_argument("file", help=f"{_FILE}; or a folder that convert wrote, to go back")
    convert.add_argument("out", help="a new folder; to go back, a file named .safetensors")
    convert.add_argument(
        "--family", choices=families.known_families(), help="default: told from the keys"
    )
    convert.add_argument("--dtype", choices=_DTYPES, help="of the floats; default: as they are")
    convert.add_argument("--part", default="", help="keep this subtree alone, as the root: trunk")
    convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def _convert(chosen: argparse.Namespace) -> int:
    out = pathlib.Path(chosen.out)
    dtype = _DTYPES.get(chosen.dtype)
    if converted.is_converted(chosen.file):
        return _convert_back(chosen, out, dtype)
    made = converted.convert(
        chosen.file,
        out,
        family=chosen.family,
        dtype=dtype,
        part=chosen.part,
        force=chosen.force,
    )
    _say_model(made.family, made.settings)
    print(f"{out}: {_totals(made.leaves.values())}")
    return 0


def _convert_back(chosen: argparse.Namespace, out: pathlib.Path, dtype: Any) -> int:
    if out.suffix != ".safetensors":
        raise WeightsError(
            f"{chosen.file} is a converted checkpoint: OUT={out} must be named .safetensors."
        )
    if chosen.family or chosen.part:
        raise WeightsError("--family and --part are for converting published weights, not back.")
    tensors = converted.export_converted(converted.open_converted(chosen.file), dtype)
    save_safetensors(out, tensors, {"format": "pt"})
    print(f"{out}: {_totals(tensors.values())}")
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    if converted.is_converted(chosen.file):
        found = converted.open_converted(chosen.file)
        _print_rows([(path, leaf.dtype, leaf.shape) for path, leaf in found.leaves.items()])
        _print_groups({path: leaf.shape for path, leaf in found.leaves.items()}, "/")
        print(_totals(found.leaves.values()))
        _say_model(found.family, found.settings)
        return 0
    tensors = files.read(chosen.file)
    entries = {name: tensors.entry(name) for name in tensors}
    _print_rows([(name, entry.dtype, entry.shape) for name, entry in entries.items()])
    _print_groups({name: entry.shape for name, entry in entries.items()}, ".")
    print(_totals(entries.values()))
    _say_family(tensors)
    return 0


def _print_rows(rows: list[tuple[str, Any, tuple[int, ...]]]) -> None:
    names = max((len(name) for name, _, _ in rows), default=0)
    for name, dtype, shape in rows:
        print(f"{name:{names}}  {dtype!s:10}  {list(shape)}")


def _print_groups(shapes: dict[str, tuple[int, ...]], separator: str) -> None:
    """Prints how many values lie under the first parts of the names that tell groups apart."""
    depth = 1
    while depth < 4 and len({_group(name, separator, depth) for name in shapes}) < 3:
        depth += 1
    sums: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for name, shape in shapes.items():
        group = _group(name, separator, depth)
        sums[group] += math.prod(shape)
        counts[group] += 1
    if len(sums) < 2:
        return
    names, digits = max(map(len, sums)), max(len(f"{n:,}") for n in sums.values())
    print()
    for group, size in sums.items():
        print(f"{group:{names}}  {size:{digits},} values in {counts[group]} tensors")
    print()


def _group(name: str, separator: str, depth: int) -> str:
    return separator.join(name.split(separator)[:-1][:depth]) or name


def _totals(arrays: Iterable[Any]) -> str:
    arrays = list(arrays)
    sizes = [math.prod(array.shape) for array in arrays]
    total = sum(n * np.dtype(a.dtype).itemsize for n, a in zip(sizes, arrays, strict=True))
    return f"{len(arrays)} tensors, {sum(sizes):,} values, {total:,} bytes"


def _say_family(tensors: TensorFile) -> None:
    try:
        family = families.detect(tensors)
    except WeightsError as error:
        known = ", ".join(families.known_families())
        refused = "" if "no known family" in str(error) else f": {str(error).splitlines()[0]}"
        print(f"family: not known{refused} (known: {known})")
        return
    try:
        _say_model(family.name, families.settings_of(family, tensors))
    except WeightsError as error:  # a config.json that is not beside the file, say
        print(f"family: {family.name}; settings not known: {error}")


def _say_model(family: str, settings: dict[str, Any]) -> None:
    print(f"family: {family}")
    names = max(map(len, settings), default=0)
    for name, value in settings.items():
        print(f"  {name:{names}}  {value}")


if __name__ == "__main__":
    # Files are read and written by the host: leave an accelerator to whom it belongs.
    import jax

    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
