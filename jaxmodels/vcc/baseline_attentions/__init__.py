"""Attention baselines that VCC is compared with, as the VCC repository wraps them.

Each module maps hidden states [batch, n, d_model] and a mask [batch, n] (1 = token) to
[batch, n, d_model]. Rows of padding are undefined. `PreNormAttention` puts a layer norm in front.
"""

from jaxmodels.vcc.baseline_attentions.linformer import LinformerAttention
from jaxmodels.vcc.baseline_attentions.longformer import LongformerAttention
from jaxmodels.vcc.baseline_attentions.nystromformer import NystromformerAttention
from jaxmodels.vcc.baseline_attentions.official import build_attention, import_attention
from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline, PreNormAttention
from jaxmodels.vcc.baseline_attentions.soft import SoftAttention

__all__ = [
    "LinformerAttention",
    "LongformerAttention",
    "MultiHeadBaseline",
    "NystromformerAttention",
    "PreNormAttention",
    "SoftAttention",
    "build_attention",
    "import_attention",
]
