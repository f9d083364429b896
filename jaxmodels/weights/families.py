"""The published families that can be told from a file alone: tables, settings, and who knows them.

A family lives in one module of this folder, which names its entries in `FAMILIES`; the modules
are listed in `MODULES`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.weights.rules import Rules
from jaxmodels.weights.tensor_file import TensorFile, WeightsError

MODULES = ("bart", "bert", "clip", "gpt2", "llama", "swin", "t5", "vit")


@dataclasses.dataclass(frozen=True)
class Family:
    """One published layout of parameters.

    None of the functions may read values: keys, shapes, dtypes and `file.config` only. The table
    of a converted checkpoint is remade from these when it is written back.

    Attributes:
      name: on the command line and in `model.json`: "bert", "t5", "clip_openai".
      detect: file -> 0 if it is none of this family, else how sure: 1 for keys that others share
        in part, 2 for keys of its own. The highest wins.
      rules: file -> the table; a bare trunk becomes the root of our tree, a model with heads keeps
        its trunk under "trunk".
      settings: file -> fields of the trunk's config that shapes, or Hugging Face's `config.json`
        beside the file (`file.config`), tell. What neither tells is left out.
    """

    name: str
    detect: Callable[[TensorFile], int]
    rules: Callable[[TensorFile], Rules]
    settings: Callable[[TensorFile], dict[str, Any]]


def known_families() -> dict[str, Family]:
    """Returns {name: family} of all modules."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(f"{__package__}.{name}")
        found |= {family.name: family for family in module.FAMILIES}
    return dict(sorted(found.items()))


def family_named(name: str) -> Family:
    """Returns the family called `name`.

    Raises:
      WeightsError: there is none; lists those there are.
    """
    families = known_families()
    if name not in families:
        raise WeightsError(f"family {name!r} is not known. Known: {', '.join(families)}.")
    return families[name]


def detect(file: TensorFile) -> Family:
    """Returns the family of a file, told from its keys and shapes.

    Raises:
      WeightsError: it is of none, or of several that are equally sure; lists the known ones.
    """
    families = known_families()
    scores = {name: family.detect(file) for name, family in families.items()}
    best = max(scores.values())
    found = [name for name, score in scores.items() if score == best]
    if best and len(found) == 1:
        return families[found[0]]
    what = f"could be any of {', '.join(found)}" if best else "is of no known family"
    first = ", ".join(map(repr, list(file)[:3])) or "none"
    raise WeightsError(
        f"{file.origin} {what} (first keys: {first}). Known: {', '.join(families)}. Name one "
        "(--family), or open the model inside a larger file by .under(prefix)."
    )


def settings_of(family: Family, file: TensorFile) -> dict[str, Any]:
    """Returns what the file tells of the trunk's config.

    Raises:
      WeightsError: a tensor or a setting that tells it is absent, or a tensor has another number
        of axes.
    """
    try:
        return family.settings(file)
    except WeightsError:  # says already what is missing
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"{file.origin} is no whole {family.name} model: {error!r}.") from error


def from_config(file: TensorFile, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns {our field: value} of those Hugging Face settings that `file.config` has.

    Args:
      file: the file; `config` holds the `config.json` beside it.
      names: {our field: Hugging Face's name}.
    """
    found = {ours: file.config.get(theirs) for ours, theirs in names.items()}
    # The file is somebody else's: nothing but plain values passes.
    return {name: v for name, v in found.items() if isinstance(v, (bool, int, float, str))}


def count_layers(file: TensorFile, start: str) -> int:
    """Returns how many different numbers follow `start` in the keys: `encoder.layer.` -> 12."""
    rest = (key[len(start) :].partition(".")[0] for key in file if key.startswith(start))
    return len({number for number in rest if number.isdecimal()})
