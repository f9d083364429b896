"""Imports packages of the `data` extra when they are needed, and says how to get an absent one."""

import importlib
from typing import Any

_DISTRIBUTIONS = {"PIL": "pillow"}


def needed(module: str, purpose: str) -> Any:
    """Returns the imported `module`, which `purpose` (such as "CLIP's tokenizer") needs.

    Raises:
      ImportError: it is not installed, or it does not load; names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = _DISTRIBUTIONS.get(package, package)
        raise ImportError(
            f"{purpose} needs the package {package}, which does not import here ({error}). "
            "Install it: pip install 'jaxmodels[data]'",
            name=module,
        ) from error
