"""Checkpoints of a run: written in the background, proven whole, restored or refused in words."""

from jaxmodels.core import manifest
from train.checkpoint.checkpoints import Checkpoints, Restored, find, load_params, retry_line

__all__ = ["Checkpoints", "Restored", "find", "load_params", "manifest", "retry_line"]
