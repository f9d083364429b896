"""Key table of Hugging Face's BART and mBART: bare, with the language head, with a classifier."""

from typing import Any

from jaxmodels.weights import hf_config
from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import Ignore, Rule, Rules, dense, norm, with_prefix
from jaxmodels.weights.tensor_file import TensorFile, WeightsError
from jaxmodels.weights.transforms import squeeze

_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
_LAYER = "encoder.layers.0"


def bart_rules(*, final_norm: bool = False) -> Rules:
    """Returns the table of `BartModel`'s two stacks, without the word table.

    Args:
      final_norm: the stacks end in a norm (mBART).
    """
    return [*_stack("encoder", final_norm), *_stack("decoder", final_norm)]


def _stack(name: str, final_norm: bool) -> list[Rule | Ignore]:
    layer, ours = f"{name}.layers.{{i}}", f"{name}/layers"
    rules: list[Rule | Ignore] = [
        Rule(f"{name}.embed_positions.weight", f"{name}_embeddings/position/embedding"),
        *norm(f"{name}.layernorm_embedding", f"{name}_embeddings/norm"),
        *dense(f"{layer}.fc1", f"{ours}/ffn/wi"),
        *dense(f"{layer}.fc2", f"{ours}/ffn/wo"),
        *norm(f"{layer}.final_layer_norm", f"{ours}/ffn_norm"),
        *_attention(f"{layer}.self_attn", f"{ours}/attention", f"{ours}/attention_norm"),
        Ignore(f"{name}.version"),
    ]
    if name == "decoder":
        our_norm = f"{ours}/cross_attention_norm"
        rules += _attention(f"{layer}.encoder_attn", f"{ours}/cross", our_norm)
    if final_norm:
        rules += norm(f"{name}.layer_norm", f"{name}/final_norm")
    return rules


def _attention(source: str, target: str, our_norm: str) -> list[Rule]:
    rules = norm(f"{source}_layer_norm", our_norm)
    for theirs, ours in _PROJECTIONS.items():
        rules += dense(f"{source}.{theirs}", f"{target}/{ours}")
    return rules


def _prefix(file: TensorFile) -> str:
    return "model." if f"model.{_LAYER}.self_attn.q_proj.weight" in file else ""


def _detect(file: TensorFile) -> int:
    at = _prefix(file)
    stacks = (f"{at}{name}.layernorm_embedding.weight" in file for name in ("encoder", "decoder"))
    return 2 * (all(stacks) and f"{at}{_LAYER}.fc1.weight" in file)


def _refuse(file: TensorFile) -> None:
    hf_config.only_types(file, "bart", ("bart", "mbart", "plbart"))
    hf_config.only_values(file, {"static_position_embeddings": (False,)})
    for one, other in (
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if file.config.get(one) != file.config.get(other):
            raise WeightsError(
                f"{file.origin}: {one}={file.config.get(one)} and "
                f"{other}={file.config.get(other)}: stacks that differ are not supported."
            )


def _pre_norm(file: TensorFile) -> bool:
    return f"{_prefix(file)}encoder.layer_norm.weight" in file


def _rules(file: TensorFile) -> Rules:
    _refuse(file)
    at = _prefix(file)
    classifier = "classification_head.dense.weight" in file
    trunk = "trunk/" if classifier else ""
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    words = [f"{at}{name}.weight" for name in names] + ["lm_head.weight"]
    source, aliases = hf_config.tied(words, file)
    rules: list[Rule | Ignore] = [
        Rule(source, f"{trunk}shared/embedding", aliases=aliases),
        *with_prefix(bart_rules(final_norm=_pre_norm(file)), at, trunk),
    ]
    if "final_logits_bias" in file:
        rules.append(Rule("final_logits_bias", f"{trunk}final_logits_bias", squeeze(0)))
    if classifier:
        for part in ("dense", "out_proj"):
            rules += dense(f"classification_head.{part}", f"classification/{part}")
    return rules


def _settings(file: TensorFile) -> dict[str, Any]:
    _refuse(file)
    at = _prefix(file)
    fc1, positions = f"{at}{_LAYER}.fc1.weight", f"{at}encoder.embed_positions.weight"
    d_ff, d_model = file.shape(fc1)
    words = [f"{at}{name}.weight" for name in ("shared", "encoder.embed_tokens")]
    found = {
        "vocab_size": file.shape(hf_config.tied(words, file)[0])[0],
        "d_model": d_model,
        "num_layers": count_layers(file, f"{at}encoder.layers."),
        "num_decoder_layers": count_layers(file, f"{at}decoder.layers."),
        "num_heads": hf_config.required_count(file, "encoder_attention_heads"),
        "d_ff": d_ff,
        "max_positions": file.shape(positions)[0] - 2,
        "norm_order": "pre" if _pre_norm(file) else "post",
        "activation": hf_config.activation(file, "activation_function", "gelu"),
        "logits_bias": "final_logits_bias" in file,
    }
    told = {
        "scale_embedding": "scale_embedding",
        "start_id": "decoder_start_token_id",
        "pad_id": "pad_token_id",
        "dropout_rate": "dropout",
        "attention_dropout_rate": "attention_dropout",
        "ffn_dropout_rate": "activation_dropout",
    }
    return found | from_config(file, told)


FAMILIES = (Family("bart", detect=_detect, rules=_rules, settings=_settings),)
