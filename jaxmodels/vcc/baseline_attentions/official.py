"""The VCC repository's names for the baselines: build one from its options, import its weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from jaxmodels.core import params
from jaxmodels.vcc.baseline_attentions.linformer import LinformerAttention
from jaxmodels.vcc.baseline_attentions.longformer import LongformerAttention
from jaxmodels.vcc.baseline_attentions.nystromformer import NystromformerAttention
from jaxmodels.vcc.baseline_attentions.projections import MultiHeadBaseline, PreNormAttention
from jaxmodels.vcc.baseline_attentions.soft import SoftAttention

PRENORM = "_prenorm"
_KINDS: dict[str, type[MultiHeadBaseline]] = {
    "linformer": LinformerAttention,
    "longformer": LongformerAttention,
    "nystromformer": NystromformerAttention,
    "soft": SoftAttention,
}
# official option -> attribute here
_OPTIONS = {
    "attention_linformer_dim": "projected_length",
    "attention_num_landmarks": "num_landmarks",
    "attention_conv_kernel_size": "conv_kernel_size",
    "window": "window",
    "num_global": "num_global",
}
# official key -> path here; "T" transposes, "conv" and "landmark" reorder a convolution kernel
_KEYS = {
    "LayerNorm.weight": ("attention_norm/scale", ""),
    "LayerNorm.bias": ("attention_norm/bias", ""),
    "attn.E": ("E", ""),
    "attn.conv.weight": ("conv", "conv"),
    "attn.Qlandmark_op.weight": ("landmark_kernel", "landmark"),
    "attn.Qnorm_act.0.weight": ("landmark_norm/scale", ""),
    "attn.Qnorm_act.0.bias": ("landmark_norm/bias", ""),
} | {
    f"{theirs}.{kind}": (f"{ours}/{name}", order)
    for theirs, ours in {"query": "query", "key": "key", "value": "value", "dense": "out"}.items()
    for kind, name, order in (("weight", "kernel", "T"), ("bias", "bias", ""))
}


def build_attention(
    name: str, num_heads: int, max_length: int, options: Mapping[str, Any]
) -> nn.Module:
    """A baseline by its official name and options.

    Args:
      name: linformer, nystromformer, soft or longformer; the suffix `_prenorm` adds the layer norm
        in front and the output projection.
      num_heads: h.
      max_length: n (Linformer's projection has this length).
      options: attention_linformer_dim, attention_num_landmarks, attention_conv_kernel_size, window,
        num_global, as the kind needs.

    Raises:
      ValueError: unknown name or option.
    """
    base = name.removesuffix(PRENORM)
    unknown = sorted(set(options) - set(_OPTIONS))
    if base not in _KINDS or unknown:
        raise ValueError(
            f"cannot build attention {name!r} with options {dict(options)}: names are "
            f"{sorted(_KINDS)} (with or without {PRENORM!r}), options {sorted(_OPTIONS)}"
        )
    fields = {_OPTIONS[key]: value for key, value in options.items()}
    if base == "linformer":
        fields["max_length"] = max_length
    prenorm = name.endswith(PRENORM)
    attention = _KINDS[base](num_heads=num_heads, output_projection=prenorm, **fields)
    return PreNormAttention(attention) if prenorm else attention


def import_attention(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `build_attention`'s module from one official attention module's state dict.

    Keys are those inside the module (`query.weight`, `attn.E`, ...). With a `LayerNorm` the result
    has the pre-norm layout (`attention_norm`, `attention`).

    Raises:
      ValueError: keys that no baseline has, all of them listed.
    """
    unknown = sorted(set(state) - set(_KEYS))
    if unknown:
        raise ValueError(f"keys of no baseline attention: {unknown}; known: {sorted(_KEYS)}")
    leaves = {}
    prefix = "attention/" if "LayerNorm.weight" in state else ""
    for key, array in state.items():
        path, order = _KEYS[key]
        array = np.asarray(array, np.float32)
        if order == "T":
            array = array.T
        elif order == "conv":  # [h, 1, kernel, 1] -> [kernel, h]
            array = array[:, 0, :, 0].T
        elif order == "landmark":  # [out, in, segment] -> [segment, in, out]
            array = array.transpose(2, 1, 0)
        leaves[path if path.startswith("attention_norm") else prefix + path] = array
    return params.unflatten(leaves)
