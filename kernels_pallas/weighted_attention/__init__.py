"""Attention over weighted tokens: a bias a key and T5's relative bias, in memory linear in r."""

from kernels_pallas.weighted_attention.api import RelativeBias, weighted_attention

__all__ = ["RelativeBias", "weighted_attention"]
