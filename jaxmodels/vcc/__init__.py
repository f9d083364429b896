"""VCC: transformers on long inputs, compressed around the tokens that matter (arXiv:2305.04241)."""

from jaxmodels.vcc.config import VccConfig, layer_kinds
from jaxmodels.vcc.encoder import VccEncoder
from jaxmodels.vcc.inputs import check_inputs
from jaxmodels.vcc.model import VccRoberta, VccWithHead
from jaxmodels.vcc.t5_model import VccT5

__all__ = [
    "VccConfig",
    "VccEncoder",
    "VccRoberta",
    "VccT5",
    "VccWithHead",
    "check_inputs",
    "layer_kinds",
]
