"""SMILE: mixture of experts routed over nodes, then inside a node (arXiv:2212.05191)."""

from jaxmodels.smile.grid import Grid
from jaxmodels.smile.layer import MoeHook, MoeMlp
from jaxmodels.smile.settings import MoeConfig

__all__ = ["Grid", "MoeConfig", "MoeHook", "MoeMlp"]
