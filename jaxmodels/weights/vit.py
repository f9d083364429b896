"""Key tables of vision transformers trained on ImageNet: timm's, Hugging Face's, the original's.

Our side is the tree of `jaxmodels.trunks.vit`, a layer's leaves stacked over `{i}`; a file with a
classifier has its trunk under "trunk".
"""

from __future__ import annotations

import math
from typing import Any

from jaxmodels.weights import hf_config
from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import Ignore, Rule, Rules, dense, drop_absent, norm, packed
from jaxmodels.weights.tensor_file import TensorFile
from jaxmodels.weights.transforms import CONV_2D, TRANSPOSE, Transform, merge_axes, squeeze

# Published heads are this wide; timm's files do not say how many there are.
HEAD_WIDTH = 64
_QKV = ("query", "key", "value")
_HF_LAYER = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "ffn/wi": "intermediate.dense",
    "ffn/wo": "output.dense",
}
_TABLE = "Transformer/posembed_input/pos_embedding"


def _embeddings(token: str, table: str, target: str) -> Rules:
    return [
        Rule(token, f"{target}embeddings/class_token", squeeze(0, 1)),
        Rule(table, f"{target}embeddings/position/embedding", squeeze(0)),
    ]


def _projection(source: str, target: str) -> Rules:
    return [
        Rule(f"{source}.weight", f"{target}embeddings/patch/kernel", CONV_2D),
        Rule(f"{source}.bias", f"{target}embeddings/patch/bias"),
    ]


def timm_vit_rules(
    prefix: str = "", target: str = "", *, qkv_bias: bool = True, final_norm: str = "norm"
) -> Rules:
    """Returns the table of a vision transformer by timm's names (DINO and MAE use them too).

    Args:
      prefix: before its keys.
      target: before our paths: "trunk/" beside a classifier.
      qkv_bias: queries, keys and values have biases.
      final_norm: name of the last norm.
    """
    block, layer = f"{prefix}blocks.{{i}}", f"{target}encoder/layers"
    qkv = [f"{layer}/attention/{name}" for name in _QKV]
    biases = packed(f"{block}.attn.qkv.bias", [f"{t}/bias" for t in qkv]) if qkv_bias else []
    return [
        *_embeddings(f"{prefix}cls_token", f"{prefix}pos_embed", target),
        *_projection(f"{prefix}patch_embed.proj", target),
        *packed(f"{block}.attn.qkv.weight", [f"{t}/kernel" for t in qkv], TRANSPOSE),
        *biases,
        *dense(f"{block}.attn.proj", f"{layer}/attention/out"),
        *norm(f"{block}.norm1", f"{layer}/attention_norm"),
        *dense(f"{block}.mlp.fc1", f"{layer}/ffn/wi"),
        *dense(f"{block}.mlp.fc2", f"{layer}/ffn/wo"),
        *norm(f"{block}.norm2", f"{layer}/ffn_norm"),
        *norm(f"{prefix}{final_norm}", f"{target}encoder/final_norm"),
        *dense(f"{prefix}pre_logits.fc", f"{target}pooler"),
    ]


def hf_vit_rules(prefix: str = "", target: str = "", *, qkv_bias: bool = True) -> Rules:
    """Returns the table of Hugging Face's `ViTModel` and `ViTForImageClassification`.

    Args:
      prefix: before the trunk's keys: "vit." beside a classifier.
      target: before our paths: "trunk/" beside a classifier.
      qkv_bias: queries, keys and values have biases.
    """
    theirs, block = f"{prefix}embeddings", f"{prefix}encoder.layer.{{i}}"
    layer = f"{target}encoder/layers"
    rules: list[Rule | Ignore] = [
        *_embeddings(f"{theirs}.cls_token", f"{theirs}.position_embeddings", target),
        *_projection(f"{theirs}.patch_embeddings.projection", target),
        *norm(f"{block}.layernorm_before", f"{layer}/attention_norm"),
        *norm(f"{block}.layernorm_after", f"{layer}/ffn_norm"),
        *norm(f"{prefix}layernorm", f"{target}encoder/final_norm"),
        *dense(f"{prefix}pooler.dense", f"{target}pooler"),
    ]
    for ours, name in _HF_LAYER.items():
        bias = qkv_bias or ours.rpartition("/")[2] not in _QKV
        rules += dense(f"{block}.{name}", f"{layer}/{ours}", bias)
    return rules


def _flax(source: str, target: str, kernel: Transform | None = None, bias: Any = None) -> Rules:
    given = {
        name: {"transform": t} if t else {} for name, t in (("kernel", kernel), ("bias", bias))
    }
    return [Rule(f"{source}/{name}", f"{target}/{name}", **more) for name, more in given.items()]


def flax_vit_rules(num_heads: int, prefix: str = "", target: str = "") -> Rules:
    """Returns the table of the original .npz files, which are Flax's own layouts.

    Args:
      num_heads: attention heads, which have an axis of their own there.
      prefix: before all keys: "opt/target/" in the first files.
      target: before our paths: "trunk/" beside a classifier.
    """
    block, layer = f"{prefix}Transformer/encoderblock_{{i}}", f"{target}encoder/layers"
    heads = f"{block}/MultiHeadDotProductAttention_1"
    rules: list[Rule | Ignore] = [
        *_embeddings(f"{prefix}cls", f"{prefix}{_TABLE}", target),
        *_flax(f"{prefix}embedding", f"{target}embeddings/patch"),
    ]
    inner = merge_axes(1, num_heads), merge_axes(0, num_heads)
    for name in _QKV:
        rules += _flax(f"{heads}/{name}", f"{layer}/attention/{name}", *inner)
    rules += _flax(f"{heads}/out", f"{layer}/attention/out", merge_axes(0, num_heads))
    for n, name in enumerate(("wi", "wo")):
        rules += _flax(f"{block}/MlpBlock_3/Dense_{n}", f"{layer}/ffn/{name}")
    norms = {
        f"{block}/LayerNorm_0": f"{layer}/attention_norm",
        f"{block}/LayerNorm_2": f"{layer}/ffn_norm",
        f"{prefix}Transformer/encoder_norm": f"{target}encoder/final_norm",
    }
    for theirs, ours in norms.items():
        rules += [Rule(f"{theirs}/{leaf}", f"{ours}/{leaf}") for leaf in ("scale", "bias")]
    return [*rules, *_flax(f"{prefix}pre_logits", f"{target}pooler")]


def _with_head(rules: Rules, head: Rules, file: TensorFile) -> Rules:
    """Returns the table of just the parts that a file has; the pooler is one, the head another."""
    # A trunk may be read from a file with a classifier: {"trunk": ...} as the template.
    head = [Rule(r.source, r.target, r.transform, optional=True) for r in head]
    target = "trunk/" if head else ""
    return [*drop_absent(rules, file, [f"{target}pooler"]), *head]


def _timm_rules(file: TensorFile) -> Rules:
    head = dense("head", "classifier") if "head.weight" in file else []
    qkv_bias = "blocks.0.attn.qkv.bias" in file
    rules = timm_vit_rules(target="trunk/" if head else "", qkv_bias=qkv_bias)
    return _with_head(rules, head, file)


def _timm_settings(file: TensorFile) -> dict[str, Any]:
    width, _, _, patch_size = file.shape("patch_embed.proj.weight")
    return {
        "image_size": _side(file.shape("pos_embed")[1]) * patch_size,
        "patch_size": patch_size,
        "d_model": width,
        "num_layers": count_layers(file, "blocks."),
        "num_heads": max(width // HEAD_WIDTH, 1),
        "d_ff": file.shape("blocks.0.mlp.fc1.weight")[0],
        "norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in file,
        "pooler": "pre_logits.fc.weight" in file,
    }


def _side(rows: int) -> int:
    return round(math.sqrt(rows - 1))


def _hf_prefix(file: TensorFile) -> str | None:
    for prefix in ("", "vit."):
        names = ("embeddings.position_embeddings", "encoder.layer.0.layernorm_before.weight")
        if all(f"{prefix}{name}" in file for name in names):
            return prefix
    return None


def _hf_qkv_bias(file: TensorFile, prefix: str) -> bool:
    return f"{prefix}encoder.layer.0.attention.attention.query.bias" in file


def _hf_rules(file: TensorFile) -> Rules:
    hf_config.only_types(file, "ViT", ("vit",))
    hf_config.only_values(file, {"pooler_act": ("tanh",)})
    prefix = _hf_prefix(file) or ""
    head = dense("classifier", "classifier") if "classifier.weight" in file else []
    target, qkv_bias = "trunk/" if head else "", _hf_qkv_bias(file, prefix)
    return _with_head(hf_vit_rules(prefix, target, qkv_bias=qkv_bias), head, file)


def _hf_settings(file: TensorFile) -> dict[str, Any]:
    prefix = _hf_prefix(file) or ""
    projection = f"{prefix}embeddings.patch_embeddings.projection.weight"
    width, _, _, patch_size = file.shape(projection)
    rows = file.shape(f"{prefix}embeddings.position_embeddings")[1]
    found = {
        "image_size": _side(rows) * patch_size,
        "patch_size": patch_size,
        "d_model": width,
        "num_layers": count_layers(file, f"{prefix}encoder.layer."),
        "num_heads": max(width // HEAD_WIDTH, 1),
        "d_ff": file.shape(f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        "activation": hf_config.activation(file, "hidden_act", "gelu"),
        "norm_eps": 1e-12,
        "qkv_bias": _hf_qkv_bias(file, prefix),
        "pooler": f"{prefix}pooler.dense.weight" in file,
    }
    return found | from_config(
        file, {"num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
    )


def _flax_prefix(file: TensorFile) -> str | None:
    for prefix in ("", "opt/target/"):
        if f"{prefix}{_TABLE}" in file and f"{prefix}embedding/kernel" in file:
            return prefix
    return None


def _flax_heads(file: TensorFile, prefix: str) -> int:
    block = f"{prefix}Transformer/encoderblock_0"
    return file.shape(f"{block}/MultiHeadDotProductAttention_1/query/kernel")[1]


def _flax_rules(file: TensorFile) -> Rules:
    prefix = _flax_prefix(file) or ""
    head = _flax(f"{prefix}head", "classifier") if f"{prefix}head/kernel" in file else []
    rules = flax_vit_rules(_flax_heads(file, prefix), prefix, "trunk/" if head else "")
    return _with_head(rules, head, file)


def _flax_settings(file: TensorFile) -> dict[str, Any]:
    prefix = _flax_prefix(file) or ""
    patch_size, _, _, width = file.shape(f"{prefix}embedding/kernel")
    block = f"{prefix}Transformer/encoderblock_"
    numbers = {key[len(block) :].partition("/")[0] for key in file if key.startswith(block)}
    return {
        "image_size": _side(file.shape(f"{prefix}{_TABLE}")[1]) * patch_size,
        "patch_size": patch_size,
        "d_model": width,
        "num_layers": len(numbers),
        "num_heads": _flax_heads(file, prefix),
        "d_ff": file.shape(f"{block}0/MlpBlock_3/Dense_0/kernel")[1],
        "norm_eps": 1e-6,
        "pooler": f"{prefix}pre_logits/kernel" in file,
    }


def _is_timm(file: TensorFile) -> bool:
    return all(key in file for key in ("cls_token", "pos_embed", "blocks.0.attn.qkv.weight"))


FAMILIES = (
    Family("vit", lambda file: 2 * (_hf_prefix(file) is not None), _hf_rules, _hf_settings),
    Family(
        "vit_flax", lambda file: 2 * (_flax_prefix(file) is not None), _flax_rules, _flax_settings
    ),
    Family("vit_timm", lambda file: 2 * _is_timm(file), _timm_rules, _timm_settings),
)
