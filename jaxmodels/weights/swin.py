"""Key tables of Swin: the official checkpoints and Hugging Face's.

Our side is the tree of `jaxmodels.trunks.swin`; a stage's layers are stacked over `{i}`.
"""

from __future__ import annotations

import math
from typing import Any

from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import Ignore, Rule, Rules, dense, norm, packed, per_stage
from jaxmodels.weights.tensor_file import TensorFile
from jaxmodels.weights.transforms import CONV_2D, TRANSPOSE

_TABLE = "relative_position_bias_table"
# Hugging Face: our part of a layer -> theirs.
_HF_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "ffn/wi": "intermediate.dense",
    "ffn/wo": "output.dense",
}
_OFFICIAL_LAYER = {"attention/out": "attn.proj", "ffn/wi": "mlp.fc1", "ffn/wo": "mlp.fc2"}
_QKV = ("attention/query", "attention/key", "attention/value")


def _patches(projection: str, after: str, root: str) -> Rules:
    return [
        Rule(f"{projection}.weight", f"{root}embeddings/patch/kernel", CONV_2D),
        Rule(f"{projection}.bias", f"{root}embeddings/patch/bias"),
        *norm(after, f"{root}embeddings/norm"),
    ]


def _merging(stage: str, root: str, depth: int) -> Rules:
    """The merging of patches that ends every stage but the last."""
    target = f"{root}stages_{{s}}/downsample"
    rules = [
        *norm(f"{stage}.downsample.norm", f"{target}/norm"),
        *dense(f"{stage}.downsample.reduction", f"{target}/reduction", bias=False),
    ]
    return per_stage(rules, range(depth - 1))


def official_swin_rules(
    stages: int, *, prefix: str = "", qkv_bias: bool = True, head: bool = False
) -> Rules:
    """Returns the table of microsoft/Swin-Transformer's classification models.

    Args:
      stages: of the model.
      prefix: before all keys: "model." where the file is a whole training state.
      qkv_bias: queries, keys and values have biases.
      head: has the classifier; our trunk then stands under "trunk".
    """
    root = "trunk/" if head else ""
    stage, layer = f"{prefix}layers.{{s}}", f"{root}stages_{{s}}/layers"
    block = f"{stage}.blocks.{{i}}"
    one: list[Rule | Ignore] = [
        *norm(f"{block}.norm1", f"{layer}/attention_norm"),
        *norm(f"{block}.norm2", f"{layer}/ffn_norm"),
        *packed(f"{block}.attn.qkv.weight", [f"{layer}/{n}/kernel" for n in _QKV], TRANSPOSE),
        Rule(f"{block}.attn.{_TABLE}", f"{layer}/relative_position_bias"),
        # Derived from the sizes; saved as buffers.
        Ignore(f"{block}.attn.relative_position_index"),
        Ignore(f"{block}.attn_mask"),
    ]
    if qkv_bias:
        one += packed(f"{block}.attn.qkv.bias", [f"{layer}/{n}/bias" for n in _QKV])
    for ours, theirs in _OFFICIAL_LAYER.items():
        one += dense(f"{block}.{theirs}", f"{layer}/{ours}")
    return [
        *_patches(f"{prefix}patch_embed.proj", f"{prefix}patch_embed.norm", root),
        *per_stage(one, range(stages)),
        *_merging(stage, root, stages),
        *norm(f"{prefix}norm", f"{root}final_norm"),
        *(dense(f"{prefix}head", "classifier") if head else ()),
    ]


def hf_swin_rules(
    stages: int, *, prefix: str = "", qkv_bias: bool = True, head: bool = False
) -> Rules:
    """Returns the table of Hugging Face's `SwinModel` and `SwinForImageClassification`.

    Args:
      stages: of the model.
      prefix: before the trunk's keys: "swin." inside a model with a head.
      qkv_bias: queries, keys and values have biases.
      head: has the classifier; our trunk then stands under "trunk".
    """
    root = "trunk/" if head else ""
    stage, layer = f"{prefix}encoder.layers.{{s}}", f"{root}stages_{{s}}/layers"
    block = f"{stage}.blocks.{{i}}"
    one: list[Rule | Ignore] = [
        *norm(f"{block}.layernorm_before", f"{layer}/attention_norm"),
        *norm(f"{block}.layernorm_after", f"{layer}/ffn_norm"),
        Rule(f"{block}.attention.self.{_TABLE}", f"{layer}/relative_position_bias"),
        Ignore(f"{block}.attention.self.relative_position_index"),
    ]
    for ours, theirs in _HF_LAYER.items():
        one += dense(f"{block}.{theirs}", f"{layer}/{ours}", bias=qkv_bias or ours not in _QKV)
    embeddings = f"{prefix}embeddings"
    return [
        *_patches(f"{embeddings}.patch_embeddings.projection", f"{embeddings}.norm", root),
        *per_stage(one, range(stages)),
        *_merging(stage, root, stages),
        *norm(f"{prefix}layernorm", f"{root}final_norm"),
        *(dense("classifier", "classifier") if head else ()),
    ]


def _prefix(file: TensorFile, accepted: tuple[str, str], first: str) -> str | None:
    """Returns the prefix under which a file has the table of the first layer, or None."""
    found = [prefix for prefix in accepted if f"{prefix}{first}.{_TABLE}" in file]
    return found[0] if len(found) == 1 else None


def _official(file: TensorFile) -> str | None:
    return _prefix(file, ("", "model."), "layers.0.blocks.0.attn")


def _hf(file: TensorFile) -> str | None:
    return _prefix(file, ("", "swin."), "encoder.layers.0.blocks.0.attention.self")


def _official_rules(file: TensorFile) -> Rules:
    prefix = _official(file) or ""
    return official_swin_rules(
        count_layers(file, f"{prefix}layers."),
        prefix=prefix,
        qkv_bias=f"{prefix}layers.0.blocks.0.attn.qkv.bias" in file,
        head=f"{prefix}head.weight" in file,
    )


def _hf_rules(file: TensorFile) -> Rules:
    prefix = _hf(file) or ""
    return hf_swin_rules(
        count_layers(file, f"{prefix}encoder.layers."),
        prefix=prefix,
        qkv_bias=f"{prefix}encoder.layers.0.blocks.0.attention.self.query.bias" in file,
        head="classifier.weight" in file,
    )


def _settings(file: TensorFile, names: dict[str, str]) -> dict[str, Any]:
    """Returns the fields of `SwinConfig` that a file tells.

    Args:
      file: the file.
      names: its keys, of a stage "{s}" and its first layer where they are not of the whole.
    """
    stages = range(count_layers(file, names["stages"]))
    tables = [file.shape(names["table"].format(s=s)) for s in stages]
    d_model, channels, patch_size, _ = file.shape(names["patch"])
    d_ff, width = file.shape(names["wi"].format(s=0))
    found = {
        "d_model": d_model,
        "depths": tuple(count_layers(file, names["blocks"].format(s=s)) for s in stages),
        "num_heads": tuple(heads for _, heads in tables),
        # (2 window - 1)**2 differences of rows and columns.
        "windows": tuple((math.isqrt(rows) + 1) // 2 for rows, _ in tables),
        "patch_size": patch_size,
        "num_channels": channels,
        "mlp_ratio": d_ff / width,
        "qkv_bias": names["qkv_bias"].format(s=0) in file,
    }
    return found | from_config(file, {"norm_eps": "layer_norm_eps", "activation": "hidden_act"})


def _official_settings(file: TensorFile) -> dict[str, Any]:
    at = _official(file) or ""
    names = {
        "stages": f"{at}layers.",
        "blocks": f"{at}layers.{{s}}.blocks.",
        "table": f"{at}layers.{{s}}.blocks.0.attn.{_TABLE}",
        "patch": f"{at}patch_embed.proj.weight",
        "wi": f"{at}layers.{{s}}.blocks.0.mlp.fc1.weight",
        "qkv_bias": f"{at}layers.{{s}}.blocks.0.attn.qkv.bias",
    }
    return _settings(file, names)


def _hf_settings(file: TensorFile) -> dict[str, Any]:
    at = _hf(file) or ""
    names = {
        "stages": f"{at}encoder.layers.",
        "blocks": f"{at}encoder.layers.{{s}}.blocks.",
        "table": f"{at}encoder.layers.{{s}}.blocks.0.attention.self.{_TABLE}",
        "patch": f"{at}embeddings.patch_embeddings.projection.weight",
        "wi": f"{at}encoder.layers.{{s}}.blocks.0.intermediate.dense.weight",
        "qkv_bias": f"{at}encoder.layers.{{s}}.blocks.0.attention.self.query.bias",
    }
    return _settings(file, names)


FAMILIES = (
    Family(
        "swin_official",
        lambda file: 2 * (_official(file) is not None),
        _official_rules,
        _official_settings,
    ),
    Family("swin_hf", lambda file: 2 * (_hf(file) is not None), _hf_rules, _hf_settings),
)
