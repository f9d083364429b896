"""A published family whose trunk is part of the toy method's model, for --config.init_from."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels import weights
from jaxmodels.weights import families
from jaxmodels.weights.rules import Rule, dense

WIDTH = 64
TABLE = [Rule("wte.weight", "embedding/table"), *dense("fc", "hidden")]
HEAD = [*dense("classifier", "head")]


def rules(file: Mapping[str, Any]) -> Sequence[Rule]:
    """The trunk at the root, or beside a head."""
    if "classifier.weight" not in file:
        return TABLE
    in_trunk = [Rule(r.source, f"trunk/{r.target}", r.transform) for r in TABLE]
    return [*in_trunk, *HEAD]


FAMILY = families.Family(
    "toy", lambda file: 2 * ("wte.weight" in file), rules, lambda file: {"width": WIDTH}
)


def publish(
    path: pathlib.Path,
    dtype: Any = np.float32,
    head: bool = False,
    width: int = WIDTH,
    rows: int = 64,
) -> dict[str, np.ndarray]:
    """Writes a .safetensors file of the family; returns its tensors."""
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (rows, width), "fc.weight": (width, width), "fc.bias": (width,)}
    shapes |= {"classifier.weight": (3, width), "classifier.bias": (3,)} if head else {}
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    weights.save_safetensors(path, tensors)
    return tensors
