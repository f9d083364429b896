"""The baselines that VCC is compared with.

Two kinds. As the VCC repository wraps them (`build_attention`): modules from hidden states
[batch, n, d_model] and a mask [batch, n] (1 = token) to [batch, n, d_model], rows of padding
undefined; `PreNormAttention` puts a layer norm in front. And as options of the trunks
(`sparse_pattern`): RoBERTa and T5 with another attention, on the same parameters.
"""

from jaxmodels.vcc.baseline_attentions.bigbird import BigBird
from jaxmodels.vcc.baseline_attentions.linformer import LinformerAttention
from jaxmodels.vcc.baseline_attentions.longformer import LongformerAttention
from jaxmodels.vcc.baseline_attentions.longt5 import LongT5
from jaxmodels.vcc.baseline_attentions.models import (
    PATTERNS,
    SparseRoberta,
    SparseT5,
    sparse_pattern,
)
from jaxmodels.vcc.baseline_attentions.nystromformer import NystromformerAttention
from jaxmodels.vcc.baseline_attentions.official import build_attention, import_attention
from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline, PreNormAttention
from jaxmodels.vcc.baseline_attentions.soft import SoftAttention
from jaxmodels.vcc.baseline_attentions.sparse import SparsePattern
from jaxmodels.vcc.baseline_attentions.window import Window

__all__ = [
    "PATTERNS",
    "BigBird",
    "LinformerAttention",
    "LongT5",
    "LongformerAttention",
    "MultiHeadBaseline",
    "NystromformerAttention",
    "PreNormAttention",
    "SoftAttention",
    "SparsePattern",
    "SparseRoberta",
    "SparseT5",
    "Window",
    "build_attention",
    "import_attention",
    "sparse_pattern",
]
