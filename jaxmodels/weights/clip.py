"""Key tables of CLIP: OpenAI's archives and Hugging Face's models, whole or one tower alone.

Our side is the tree of `jaxmodels.trunks.clip`, a layer's leaves stacked over `{i}`: `text`,
`vision` and `logit_scale`; a tower alone is the root.
"""

from __future__ import annotations

import math
from typing import Any

from jaxmodels.weights import hf_config
from jaxmodels.weights.families import Family, count_layers
from jaxmodels.weights.rules import Ignore, Rule, Rules, dense, drop_absent, norm, packed
from jaxmodels.weights.tensor_file import TensorFile
from jaxmodels.weights.transforms import CONV_2D, TRANSPOSE

# Published heads are this wide; no file says how many there are.
HEAD_WIDTH = 64
_QKV = ("query", "key", "value")
_STAGES = (1, 2, 3, 4)
_OPENAI_LAYER = "transformer.resblocks.0.attn.in_proj_weight"
# What OpenAI's archives hold beside weights, and what OpenCLIP does.
_OPENAI_BUFFERS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_HF_LAYER = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "ffn/wi": "mlp.fc1",
    "ffn/wo": "mlp.fc2",
}
# Of the image tower, of a layer of either: what trains elsewhere without changing our formula.
_HF_TYPES = ("clip", "clip_text_model", "clip_vision_model")


def _openai_layers(source: str, target: str) -> Rules:
    block, layer = f"{source}transformer.resblocks.{{i}}", f"{target}encoder/layers"
    qkv = [f"{layer}/attention/{name}" for name in _QKV]
    return [
        *packed(f"{block}.attn.in_proj_weight", [f"{t}/kernel" for t in qkv], TRANSPOSE),
        *packed(f"{block}.attn.in_proj_bias", [f"{t}/bias" for t in qkv]),
        *dense(f"{block}.attn.out_proj", f"{layer}/attention/out"),
        *norm(f"{block}.ln_1", f"{layer}/attention_norm"),
        *dense(f"{block}.mlp.c_fc", f"{layer}/ffn/wi"),
        *dense(f"{block}.mlp.c_proj", f"{layer}/ffn/wo"),
        *norm(f"{block}.ln_2", f"{layer}/ffn_norm"),
    ]


def openai_text_rules(target: str = "") -> Rules:
    """Returns the table of OpenAI's text tower; our paths start with `target`, "text/"."""
    return [
        Rule("token_embedding.weight", f"{target}embeddings/word/embedding"),
        Rule("positional_embedding", f"{target}embeddings/position/embedding"),
        *_openai_layers("", target),
        *norm("ln_final", f"{target}encoder/final_norm"),
        Rule("text_projection", f"{target}projection/kernel"),
    ]


def openai_vit_rules(prefix: str = "visual.", target: str = "") -> Rules:
    """Returns the table of OpenAI's vision transformer.

    Args:
      prefix: before its keys: "visual." in a whole model.
      target: before our paths: "vision/" in a whole model.
    """
    return [
        Rule(f"{prefix}class_embedding", f"{target}embeddings/class_token"),
        Rule(f"{prefix}conv1.weight", f"{target}embeddings/patch/kernel", CONV_2D),
        Rule(f"{prefix}positional_embedding", f"{target}embeddings/position/embedding"),
        *norm(f"{prefix}ln_pre", f"{target}embeddings_norm"),
        *_openai_layers(prefix, target),
        *norm(f"{prefix}ln_post", f"{target}encoder/final_norm"),
        Rule(f"{prefix}proj", f"{target}projection/kernel"),
    ]


def _convolution(conv: str, batch_norm: str, target: str, **options: Any) -> Rules:
    names = {"weight": "scale", "bias": "bias"}
    names |= {name: name for name in ("running_mean", "running_var")}
    return [
        Rule(f"{conv}.weight", f"{target}/kernel", CONV_2D, **options),
        *(
            Rule(f"{batch_norm}.{theirs}", f"{target}/norm/{ours}", **options)
            for theirs, ours in names.items()
        ),
    ]


def openai_resnet_rules(
    num_blocks: tuple[int, ...], prefix: str = "visual.", target: str = ""
) -> Rules:
    """Returns the table of OpenAI's residual image tower.

    Args:
      num_blocks: of each stage.
      prefix: before its keys: "visual." in a whole model.
      target: before our paths: "vision/" in a whole model.
    """
    rules: list[Rule | Ignore] = []
    for n in (1, 2, 3):
        rules += _convolution(f"{prefix}conv{n}", f"{prefix}bn{n}", f"{target}stem_{n}")
    for stage, depth in zip(_STAGES, num_blocks, strict=True):
        theirs, ours = f"{prefix}layer{stage}", f"{target}stage_{stage}"
        rest = tuple(range(1, depth))
        for n in (1, 2, 3):
            conv, batch_norm = f"conv{n}", f"bn{n}"
            first = (f"{theirs}.0.{conv}", f"{theirs}.0.{batch_norm}", f"{ours}/first/conv{n}")
            rules += _convolution(*first)
            if rest:
                more = f"{theirs}.{{i}}.{conv}", f"{theirs}.{{i}}.{batch_norm}"
                rules += _convolution(*more, f"{ours}/rest/conv{n}", layers=rest)
        down = f"{theirs}.0.downsample"
        rules += _convolution(f"{down}.0", f"{down}.1", f"{ours}/first/shortcut")
    pool = f"{target}attention_pool"
    table = f"{prefix}attnpool.positional_embedding"
    rules += [Rule(table, f"{pool}/position/embedding")]
    for theirs, ours in zip("qkvc", (*_QKV, "out"), strict=True):
        rules += dense(f"{prefix}attnpool.{theirs}_proj", f"{pool}/{ours}")
    # Counts training steps; inference never reads it.
    return [*rules, Ignore(f"{prefix}*.num_batches_tracked")]


def _hf_layers(prefix: str, target: str) -> Rules:
    block, layer = f"{prefix}encoder.layers.{{i}}", f"{target}encoder/layers"
    rules: list[Rule | Ignore] = [
        *norm(f"{block}.layer_norm1", f"{layer}/attention_norm"),
        *norm(f"{block}.layer_norm2", f"{layer}/ffn_norm"),
        # A buffer that some versions saved: 0, 1, 2, ...
        Ignore(f"{prefix}embeddings.position_ids"),
    ]
    for ours, theirs in _HF_LAYER.items():
        rules += dense(f"{block}.{theirs}", f"{layer}/{ours}")
    return rules


def hf_text_rules(prefix: str = "text_model.", target: str = "") -> Rules:
    """Returns the table of Hugging Face's text tower.

    Args:
      prefix: before its keys: "text_model.", or "" in exports of transformers 5.
      target: before our paths: "text/" in a whole model.
    """
    tables = {"token_embedding": "word", "position_embedding": "position"}
    return [
        *(
            Rule(f"{prefix}embeddings.{theirs}.weight", f"{target}embeddings/{ours}/embedding")
            for theirs, ours in tables.items()
        ),
        *_hf_layers(prefix, target),
        *norm(f"{prefix}final_layer_norm", f"{target}encoder/final_norm"),
        *dense("text_projection", f"{target}projection", bias=False),
    ]


def hf_vision_rules(prefix: str = "vision_model.", target: str = "") -> Rules:
    """Returns the table of Hugging Face's image tower.

    Args:
      prefix: before its keys: "vision_model.", or "" in exports of transformers 5.
      target: before our paths: "vision/" in a whole model.
    """
    theirs, ours = f"{prefix}embeddings", f"{target}embeddings"
    return [
        Rule(f"{theirs}.class_embedding", f"{ours}/class_token"),
        Rule(f"{theirs}.patch_embedding.weight", f"{ours}/patch/kernel", CONV_2D),
        Rule(f"{theirs}.position_embedding.weight", f"{ours}/position/embedding"),
        *norm(f"{prefix}pre_layrnorm", f"{target}embeddings_norm"),  # their spelling
        *_hf_layers(prefix, target),
        *norm(f"{prefix}post_layernorm", f"{target}encoder/final_norm"),
        *dense("visual_projection", f"{target}projection", bias=False),
    ]


def openai_clip_rules(num_blocks: tuple[int, ...] | None = None) -> Rules:
    """Returns the table of a whole model in OpenAI's layout; `num_blocks` of a residual tower."""
    image = {"prefix": "visual.", "target": "vision/"}
    vision = openai_resnet_rules(num_blocks, **image) if num_blocks else openai_vit_rules(**image)
    scale = Rule("logit_scale", "logit_scale")
    return [*openai_text_rules("text/"), *vision, scale, *map(Ignore, _OPENAI_BUFFERS)]


def hf_clip_rules() -> Rules:
    """Returns the table of Hugging Face's `CLIPModel`."""
    towers = hf_text_rules(target="text/") + hf_vision_rules(target="vision/")
    return [*towers, Rule("logit_scale", "logit_scale")]


def _openai_vision(file: TensorFile) -> str | None:
    """Returns the prefix of the image tower's keys, or None."""
    for prefix in ("visual.", ""):
        if f"{prefix}conv1.weight" not in file:
            continue
        vit = f"{prefix}class_embedding" in file and f"{prefix}{_OPENAI_LAYER}" in file
        if vit or f"{prefix}attnpool.positional_embedding" in file:
            return prefix
    return None


def _openai_text(file: TensorFile) -> bool:
    return "token_embedding.weight" in file and _OPENAI_LAYER in file


def _num_blocks(file: TensorFile, prefix: str) -> tuple[int, ...] | None:
    if f"{prefix}attnpool.positional_embedding" not in file:
        return None
    return tuple(count_layers(file, f"{prefix}layer{stage}.") for stage in _STAGES)


def _openai_rules(file: TensorFile) -> Rules:
    prefix, text = _openai_vision(file), _openai_text(file)
    blocks = None if prefix is None else _num_blocks(file, prefix)
    if text and prefix is not None:
        return openai_clip_rules(blocks)
    if text:
        rules = openai_text_rules()
    elif blocks:
        return openai_resnet_rules(blocks, prefix or "")
    else:
        rules = openai_vit_rules(prefix or "")
    rules = drop_absent(rules, file, ["projection"])
    return [*rules, *map(Ignore, ("logit_scale", *_OPENAI_BUFFERS))]


def _sizes(file: TensorFile, layers: str, width: int, projection: str, axis: int) -> dict[str, Any]:
    return {
        "d_model": width,
        "num_layers": count_layers(file, layers),
        "num_heads": max(width // HEAD_WIDTH, 1),
        "projection_dim": file.shape(projection)[axis] if projection in file else None,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
    }


def _vit_settings(rows: int, patch_size: int) -> dict[str, Any]:
    """Returns what sets CLIP's vision transformer apart from others, and its image size."""
    return {
        "image_size": round(math.sqrt(rows - 1)) * patch_size,
        "patch_size": patch_size,
        "patch_bias": False,
        "embeddings_norm": True,
        "initialization": "clip",
    }


def _openai_text_settings(file: TensorFile) -> dict[str, Any]:
    vocab_size, width = file.shape("token_embedding.weight")
    sizes = _sizes(file, "transformer.resblocks.", width, "text_projection", 1)
    sizes["d_ff"] = file.shape("transformer.resblocks.0.mlp.c_fc.weight")[0]
    rows = file.shape("positional_embedding")[0]
    return sizes | {"vocab_size": vocab_size, "max_positions": rows}


def _openai_vision_settings(file: TensorFile, prefix: str) -> dict[str, Any]:
    if blocks := _num_blocks(file, prefix):
        width = file.shape(f"{prefix}layer1.0.conv1.weight")[0]
        rows = file.shape(f"{prefix}attnpool.positional_embedding")[0]
        return {
            "image_size": 32 * round(math.sqrt(rows - 1)),
            "width": width,
            "num_blocks": blocks,
            "num_heads": max(32 * width // HEAD_WIDTH, 1),
            "projection_dim": file.shape(f"{prefix}attnpool.c_proj.weight")[0],
        }
    width, _, _, patch_size = file.shape(f"{prefix}conv1.weight")
    rows = file.shape(f"{prefix}positional_embedding")[0]
    block = f"{prefix}transformer.resblocks."
    sizes = _sizes(file, block, width, f"{prefix}proj", 1)
    sizes["d_ff"] = file.shape(f"{block}0.mlp.c_fc.weight")[0]
    return sizes | _vit_settings(rows, patch_size)


def _openai_settings(file: TensorFile) -> dict[str, Any]:
    """Returns fields of `TextConfig` or `VitConfig` / `ResNetConfig`; both, by tower, if whole."""
    prefix = _openai_vision(file)
    if not _openai_text(file):
        return _openai_vision_settings(file, prefix or "")
    text = _openai_text_settings(file)
    if prefix is None:
        return text
    return {"text": text, "vision": _openai_vision_settings(file, prefix)}


def _hf_prefix(file: TensorFile, tower: str, key: str) -> str | None:
    """Returns the prefix of a tower's keys, or None; `key` is one that it has."""
    layer = "encoder.layers.0.self_attn.q_proj.weight"
    for prefix in (f"{tower}_model.", ""):
        if f"{prefix}embeddings.{key}" in file and f"{prefix}{layer}" in file:
            return prefix
    return None


def _hf_towers(file: TensorFile) -> tuple[str | None, str | None]:
    text = _hf_prefix(file, "text", "token_embedding.weight")
    return text, _hf_prefix(file, "vision", "class_embedding")


def _hf_rules(file: TensorFile) -> Rules:
    hf_config.only_types(file, "CLIP", _HF_TYPES)
    text, vision = _hf_towers(file)
    if text is not None and vision is not None:
        return hf_clip_rules()
    rules = hf_vision_rules(vision or "") if text is None else hf_text_rules(text)
    return drop_absent(rules, file, ["projection"])


def _hf_tower_settings(
    file: TensorFile, tower: str, prefix: str, projection: str
) -> dict[str, Any]:
    """Returns the settings that both towers share; config.json may hold them under `tower`."""
    nested = file.config.get(f"{tower}_config", file.config)
    file = file.under("")
    file.config = nested if isinstance(nested, dict) else {}
    width = file.shape(f"{prefix}encoder.layers.0.layer_norm1.weight")[0]
    sizes = _sizes(file, f"{prefix}encoder.layers.", width, projection, 0)
    sizes["d_ff"] = file.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
    sizes["activation"] = hf_config.activation(file, "hidden_act", "quick_gelu")
    for ours, theirs in {"num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}.items():
        if isinstance(file.config.get(theirs), (int, float)):
            sizes[ours] = file.config[theirs]
    if tower == "text":
        table = file.shape(f"{prefix}embeddings.token_embedding.weight")
        end = file.config.get("eos_token_id")
        # The first configs say 2, and mean the highest id.
        known = isinstance(end, int) and end != 2 and end < table[0]
        rows = file.shape(f"{prefix}embeddings.position_embedding.weight")[0]
        return sizes | {
            "vocab_size": table[0],
            "max_positions": rows,
            "end_id": end if known else None,
        }
    patch_size = file.shape(f"{prefix}embeddings.patch_embedding.weight")[3]
    rows = file.shape(f"{prefix}embeddings.position_embedding.weight")[0]
    return sizes | _vit_settings(rows, patch_size)


def _hf_settings(file: TensorFile) -> dict[str, Any]:
    """Returns fields of `TextConfig` or `VitConfig`; both, by tower, if the model is whole."""
    text, vision = _hf_towers(file)
    found = {}
    if text is not None:
        found["text"] = _hf_tower_settings(file, "text", text, "text_projection.weight")
    if vision is not None:
        found["vision"] = _hf_tower_settings(file, "vision", vision, "visual_projection.weight")
    return found if len(found) == 2 else next(iter(found.values()))


FAMILIES = (
    Family(
        "clip",
        detect=lambda file: 2 * (_hf_towers(file) != (None, None)),
        rules=_hf_rules,
        settings=_hf_settings,
    ),
    Family(
        "clip_openai",
        detect=lambda file: 2 * (_openai_text(file) or _openai_vision(file) is not None),
        rules=_openai_rules,
        settings=_openai_settings,
    ),
)
