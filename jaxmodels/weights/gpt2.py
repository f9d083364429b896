"""Key table of Hugging Face's GPT-2, whose projections are kept [in, out], three in one."""

from typing import Any

from jaxmodels.weights import hf_config
from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import TRANSPOSE, Ignore, Rule, Rules, norm, packed
from jaxmodels.weights.tensor_file import TensorFile

_HEAD = "lm_head.weight"


def gpt2_rules(
    prefix: str = "", *, aliases: tuple[str, ...] = (_HEAD,), tied_head: bool = True
) -> Rules:
    """Returns the table of `GPT2Model`, and of the head of `GPT2LMHeadModel`.

    Args:
      prefix: before the trunk's keys: "" for GPT2Model, "transformer." with a head.
      aliases: names of the tied head.
      tied_head: the word table is the head; else the head has a kernel of its own.
    """
    layer, ours = f"{prefix}h.{{i}}", "decoder/layers"
    words = aliases if tied_head else ()
    qkv = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
    rules: list[Rule | Ignore] = [
        Rule(f"{prefix}wte.weight", "embeddings/word/embedding", aliases=words),
        Rule(f"{prefix}wpe.weight", "embeddings/position/embedding"),
        *norm(f"{prefix}ln_f", "decoder/final_norm"),
        *norm(f"{layer}.ln_1", f"{ours}/attention_norm"),
        *norm(f"{layer}.ln_2", f"{ours}/ffn_norm"),
        *packed(f"{layer}.attn.c_attn.weight", [f"{name}/kernel" for name in qkv], axis=1),
        *packed(f"{layer}.attn.c_attn.bias", [f"{name}/bias" for name in qkv]),
        # Buffers that old versions saved: the causal mask and its value.
        Ignore(f"{layer}.attn.bias"),
        Ignore(f"{layer}.attn.masked_bias"),
    ]
    projections = {
        "attn.c_proj": "attention/out",
        "mlp.c_fc": "ffn/wi",
        "mlp.c_proj": "ffn/wo",
    }
    for theirs, target in projections.items():
        rules.append(Rule(f"{layer}.{theirs}.weight", f"{ours}/{target}/kernel"))
        rules.append(Rule(f"{layer}.{theirs}.bias", f"{ours}/{target}/bias"))
    if not tied_head:
        rules.append(Rule(_HEAD, "lm_head/kernel", TRANSPOSE))
    return rules


def _prefix(file: TensorFile) -> str:
    return "transformer." if "transformer.wte.weight" in file else ""


def _detect(file: TensorFile) -> int:
    at = _prefix(file)
    names = ("wpe.weight", "h.0.attn.c_attn.weight", "h.0.ln_1.bias")
    return 2 * all(f"{at}{name}" in file for name in names)


def _refuse(file: TensorFile) -> None:
    hf_config.only_types(file, "gpt2", ("gpt2",))
    hf_config.only_values(
        file,
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )


def _tied(file: TensorFile) -> bool:
    return _HEAD not in file or file.config.get("tie_word_embeddings") is not False


def _rules(file: TensorFile) -> Rules:
    _refuse(file)
    aliases = (_HEAD,) if _HEAD in file else ()
    return gpt2_rules(_prefix(file), aliases=aliases, tied_head=_tied(file))


def _settings(file: TensorFile) -> dict[str, Any]:
    _refuse(file)
    at = _prefix(file)
    vocab_size, d_model = file.shape(f"{at}wte.weight")
    found = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_layers": count_layers(file, f"{at}h."),
        "num_heads": hf_config.required_count(file, "n_head"),
        "d_ff": file.shape(f"{at}h.0.mlp.c_fc.weight")[1],
        "max_positions": file.shape(f"{at}wpe.weight")[0],
        "activation": hf_config.activation(file, "activation_function", "gelu_new"),
        "tied_head": _tied(file),
    }
    told = {
        "norm_eps": "layer_norm_epsilon",
        "dropout_rate": "resid_pdrop",
        "attention_dropout_rate": "attn_pdrop",
    }
    return found | from_config(file, told)


FAMILIES = (Family("gpt2", detect=_detect, rules=_rules, settings=_settings),)
