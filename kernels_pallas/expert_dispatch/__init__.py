"""Rows of tokens into expert order and back: gathers whose gradients are gathers too."""

from kernels_pallas.expert_dispatch.api import combine, inverse, take_rows

__all__ = ["combine", "inverse", "take_rows"]
