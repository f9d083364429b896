"""Checkpoints of a run: written in the background, proven whole, restored or refused in words."""

from jaxmodels.core import manifest
from train.checkpoint.checkpoints import Checkpoints, Restored, retry_line
from train.checkpoint.stored import FOLDER, StoredParams, find, load_params, open_params

__all__ = [
    "FOLDER",
    "Checkpoints",
    "Restored",
    "StoredParams",
    "find",
    "load_params",
    "manifest",
    "open_params",
    "retry_line",
]
