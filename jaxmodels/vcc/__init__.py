"""VCC: transformers on long inputs, compressed around the tokens that matter (arXiv:2305.04241)."""

from jaxmodels.vcc.encoder import VccConfig, VccEncoder, layer_kinds
from jaxmodels.vcc.inputs import check_inputs
from jaxmodels.vcc.model import VccRoberta, VccWithHead

__all__ = [
    "VccConfig",
    "VccEncoder",
    "VccRoberta",
    "VccWithHead",
    "check_inputs",
    "layer_kinds",
]
