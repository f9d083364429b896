"""The short way: a published checkpoint, from its path to settings and parameters."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from jaxmodels.weights.families import detect, family_named, settings_of
from jaxmodels.weights.files import read
from jaxmodels.weights.importing import tree_of
from jaxmodels.weights.sharded import load_sharded


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A published model.

    Attributes:
      family: its layout, such as "t5" or "clip_openai".
      settings: fields of the trunk's config, as far as the file (and the config.json beside it)
        tells: `t5.T5Config(**loaded.settings)`.
      params: the parameters of the trunk, arrays on the default device.
    """

    family: str
    settings: dict[str, Any]
    params: Any


def load(
    path: str | os.PathLike[str], *, family: str | None = None, dtype: Any = np.float32
) -> Loaded:
    """Reads a checkpoint of any known family.

    On a mesh use `load_sharded` with a template that has shardings; this places whole arrays.

    Args:
      path: a Hugging Face folder, .safetensors, shard index, PyTorch zip, TorchScript or .npz.
      family: its name, where the file alone does not tell.
      dtype: of the parameters.

    Raises:
      WeightsError: not readable, of no known family, or not whole; nothing has been loaded then.
    """
    file = read(path)
    chosen = detect(file) if family is None else family_named(family)
    settings, rules = settings_of(chosen, file), chosen.rules(file)
    template = tree_of(file, rules)
    return Loaded(chosen.name, settings, load_sharded(template, file, rules, dtype=dtype))
