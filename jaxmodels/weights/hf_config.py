"""What a Hugging Face config.json has to tell where shapes cannot, and what we must not pass over.

Families whose keys are shared by models of other formulas (Llama's by Gemma, BART's by Blenderbot)
would load those without complaint and compute something else: such settings are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxmodels.weights.tensor_file import TensorFile, WeightsError

_ACTIVATIONS = {
    "swish": "silu",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python": "gelu",
}


def required_count(file: TensorFile, name: str) -> int:
    """Returns the count that `config.json` gives as `name`.

    Raises:
      WeightsError: there is no config.json beside the file, or no such count in it.
    """
    value = file.config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WeightsError(
            f"{file.origin}: config.json gives {name}={value!r}, which the shapes do not tell; "
            "put the model's config.json beside the file."
        )
    return value


def divided(file: TensorFile, key: str, size: int, parts: int) -> int:
    """Returns size / parts, of the tensor `key`.

    Raises:
      WeightsError: it is no whole number.
    """
    if size % parts:
        raise WeightsError(
            f"{file.origin}: {key} has {size} columns, which {parts} heads do not divide; is "
            "config.json that of this model?"
        )
    return size // parts


def activation(file: TensorFile, name: str, default: str) -> str:
    """Returns the activation that `config.json` gives as `name`, under our name."""
    value = str(file.config.get(name, default))
    return _ACTIVATIONS.get(value, value)


def only_types(file: TensorFile, family: str, types: Collection[str]) -> None:
    """Refuses a file whose `model_type` is not one of `types`; no `model_type` passes.

    Raises:
      WeightsError: another model with this family's keys.
    """
    found = file.config.get("model_type")
    if found is not None and found not in types:
        raise WeightsError(
            f"{file.origin} has the keys of {family}, but config.json says model_type={found!r}, "
            f"whose formula differs; read are {', '.join(sorted(types))}."
        )


def only_values(file: TensorFile, allowed: Mapping[str, Collection[Any]]) -> None:
    """Refuses settings of `config.json` that change the formula; absent ones pass.

    Args:
      file: the file.
      allowed: {Hugging Face's name: values under which our formula holds}.

    Raises:
      WeightsError: another value.
    """
    for name, values in allowed.items():
        if name in file.config and file.config[name] not in values:
            raise WeightsError(
                f"{file.origin}: config.json says {name}={file.config[name]!r}, which is not "
                f"supported; supported: {', '.join(map(repr, values))}."
            )


def tied(keys: Collection[str], file: TensorFile) -> tuple[str, tuple[str, ...]]:
    """Returns (source, aliases) of a tied tensor: those of its names that the file has."""
    found = [key for key in keys if key in file]
    source, *aliases = found or list(keys)[:1]
    return source, tuple(aliases)
