"""Key table of Hugging Face's T5: v1.0, v1.1 and FLAN; encoders alone too."""

from typing import Any

from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import TRANSPOSE, Ignore, Rule, Rules, dense, norm
from jaxmodels.weights.tensor_file import TensorFile

_BIAS = "relative_attention_bias.weight"


def t5_rules(
    *, gated: bool, tied_head: bool, decoder: bool = True, repeated_bias: int = 1
) -> Rules:
    """Returns the table of `T5ForConditionalGeneration`, or of `T5EncoderModel`.

    Args:
      gated: the feed-forward has wi_0 and wi_1 (v1.1) in place of wi.
      tied_head: the word table is the head: a `lm_head.weight` in the file must equal it.
      decoder: the file has one.
      repeated_bias: encoder layers under which the position bias stands, one array in all of them:
        1 as published, every layer in files of the VCC authors.
    """
    tied = ["encoder.embed_tokens.weight"] + ["decoder.embed_tokens.weight"] * decoder
    tied += ["lm_head.weight"] * (tied_head and decoder)
    rules: list[Rule | Ignore] = [
        Rule("shared.weight", "shared/embedding", aliases=tuple(tied)),
        *_stack("encoder", ("attention",), gated, repeated_bias),
    ]
    if decoder:
        rules += _stack("decoder", ("attention", "cross"), gated)
        # Old files carry a table that nothing reads.
        rules.append(Ignore(f"decoder.block.0.layer.1.EncDecAttention.{_BIAS}"))
    if decoder and not tied_head:
        rules.append(Rule("lm_head.weight", "lm_head/kernel", TRANSPOSE))
    return rules


def _stack(
    name: str, attentions: tuple[str, ...], gated: bool, repeated_bias: int = 1
) -> list[Rule | Ignore]:
    block, ours = f"{name}.block.{{i}}.layer", f"{name}/layers"
    bias, *copies = (_bias_key(name, i) for i in range(repeated_bias))
    rules: list[Rule | Ignore] = [
        Rule(bias, f"{name}/relative_bias/embedding", aliases=tuple(copies), copies=tuple(copies)),
        *norm(f"{name}.final_layer_norm", f"{name}/final_norm", bias=False),
    ]
    for i, attention in enumerate(attentions):
        theirs = "EncDecAttention" if attention == "cross" else "SelfAttention"
        for short, part in zip("qkvo", ("query", "key", "value", "out"), strict=True):
            source, target = f"{block}.{i}.{theirs}.{short}", f"{ours}/{attention}/{part}"
            rules += dense(source, target, bias=False)
        our_norm = "cross_attention_norm" if attention == "cross" else "attention_norm"
        rules += norm(f"{block}.{i}.layer_norm", f"{ours}/{our_norm}", bias=False)
    last = len(attentions)
    for part in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
        source = f"{block}.{last}.DenseReluDense.{part}"
        rules += dense(source, f"{ours}/ffn/{part}", bias=False)
    rules += norm(f"{block}.{last}.layer_norm", f"{ours}/ffn_norm", bias=False)
    return rules


def _bias_key(stack: str, layer: int) -> str:
    return f"{stack}.block.{layer}.layer.0.SelfAttention.{_BIAS}"


def _gated(file: TensorFile) -> bool:
    return "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in file


def _has_decoder(file: TensorFile) -> bool:
    return "decoder.block.0.layer.0.SelfAttention.q.weight" in file


def _tied(file: TensorFile) -> bool:
    """Whether the word table is the head: where the file has no other, in v1.0 beside its copy."""
    # Newest writers call every T5 tied: a gated model that brings a head has its own all the same.
    own = _gated(file) or file.config.get("tie_word_embeddings") is False
    return "lm_head.weight" not in file or not own


def _rules(file: TensorFile) -> Rules:
    layers = count_layers(file, "encoder.block.")
    copies = sum(_bias_key("encoder", i) in file for i in range(layers))
    return t5_rules(
        gated=_gated(file),
        tied_head=_tied(file),
        decoder=_has_decoder(file),
        repeated_bias=layers if copies > 1 else 1,
    )


def _settings(file: TensorFile) -> dict[str, Any]:
    q = "encoder.block.0.layer.0.SelfAttention.q.weight"
    table = _bias_key("encoder", 0)
    wi = "encoder.block.0.layer.1.DenseReluDense." + ("wi_0" if _gated(file) else "wi")
    vocab_size, d_model = file.shape("shared.weight")
    num_buckets, num_heads = file.shape(table)
    found = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_layers": count_layers(file, "encoder.block."),
        "num_heads": num_heads,
        "head_dim": file.shape(q)[0] // num_heads,
        "d_ff": file.shape(f"{wi}.weight")[0],
        "activation": "gelu_new" if _gated(file) else "relu",
        "gated": _gated(file),
        "tied_head": _tied(file),
        "num_buckets": num_buckets,
    }
    if found["tied_head"]:
        tied = file.config.get("tie_word_embeddings") is not False
        found["scaled_output"] = bool(file.config.get("scale_decoder_outputs", tied))
    if _has_decoder(file):
        found["num_decoder_layers"] = count_layers(file, "decoder.block.")
    told = {
        "max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "dropout_rate": "dropout_rate",
        "start_id": "decoder_start_token_id",
    }
    return found | from_config(file, told)


FAMILIES = (
    Family(
        "t5",
        detect=lambda file: 2 * (_bias_key("encoder", 0) in file),
        rules=_rules,
        settings=_settings,
    ),
)
