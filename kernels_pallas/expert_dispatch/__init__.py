"""Rows of tokens into expert order and back: gathers whose gradients are gathers too."""

from kernels_pallas.expert_dispatch.api import IMPLEMENTATIONS, combine, inverse, take_rows

__all__ = ["IMPLEMENTATIONS", "combine", "inverse", "take_rows"]
