"""Key table of Hugging Face's Llama, and of Mistral and Qwen2, which share formula and keys."""

from typing import Any

from jaxmodels.weights import hf_config
from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import TRANSPOSE, Ignore, Rule, Rules, dense, norm
from jaxmodels.weights.tensor_file import TensorFile, WeightsError

_HEAD = "lm_head.weight"
_QKV = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_TYPES = ("llama", "mistral", "qwen2")
_ROPE = {
    "rope_factor": "factor",
    "rope_low_frequency_factor": "low_freq_factor",
    "rope_high_frequency_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}


def llama_rules(
    prefix: str = "model.",
    *,
    qkv_bias: bool = False,
    use_bias: bool = False,
    word_aliases: tuple[str, ...] = (),
    head: bool = True,
) -> Rules:
    """Returns the table of `LlamaForCausalLM` or `LlamaModel`.

    Args:
      prefix: before the trunk's keys: "model.", or "" for LlamaModel.
      qkv_bias: queries, keys and values have biases (Qwen2).
      use_bias: the other projections have biases.
      word_aliases: other names of the word table: the tied head, where the file has it.
      head: the file has a head of its own.
    """
    layer, ours = f"{prefix}layers.{{i}}", "decoder/layers"
    rules: list[Rule | Ignore] = [
        Rule(f"{prefix}embed_tokens.weight", "embeddings/word/embedding", aliases=word_aliases),
        *norm(f"{prefix}norm", "decoder/final_norm", bias=False),
        *norm(f"{layer}.input_layernorm", f"{ours}/attention_norm", bias=False),
        *norm(f"{layer}.post_attention_layernorm", f"{ours}/ffn_norm", bias=False),
        *dense(f"{layer}.self_attn.o_proj", f"{ours}/attention/out", use_bias),
        *dense(f"{layer}.mlp.gate_proj", f"{ours}/ffn/wi_0", use_bias),
        *dense(f"{layer}.mlp.up_proj", f"{ours}/ffn/wi_1", use_bias),
        *dense(f"{layer}.mlp.down_proj", f"{ours}/ffn/wo", use_bias),
        # A buffer that old versions saved: the frequencies.
        Ignore(f"{layer}.self_attn.rotary_emb.inv_freq"),
    ]
    for theirs, name in _QKV.items():
        rules += dense(f"{layer}.self_attn.{theirs}", f"{ours}/attention/{name}", qkv_bias)
    if head:
        rules.append(Rule(_HEAD, "lm_head/kernel", TRANSPOSE))
    return rules


def _prefix(file: TensorFile) -> str:
    return "model." if "model.embed_tokens.weight" in file else ""


def _detect(file: TensorFile) -> int:
    at = _prefix(file)
    names = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj")
    return 2 * all(f"{at}{name}.weight" in file for name in names)


def _rope(file: TensorFile) -> dict[str, Any]:
    """Returns what config.json says of rotary embeddings, in its older and its newer form."""
    config = file.config
    parts = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(part, dict) for part in parts):
        raise WeightsError(f"{file.origin}: rope settings {parts} are not understood.")
    # Where there are both, the older form counts, as it does in transformers.
    found = {
        k: v for part in parts for k, v in {"rope_type": part.get("type"), **part}.items() if v
    }
    kind = found.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise WeightsError(
            f"{file.origin}: config.json says rope_type={kind!r}, which is not supported; "
            "supported: 'default', 'llama3'."
        )
    share = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise WeightsError(
            f"{file.origin}: config.json says partial_rotary_factor={share}: heads that turn in "
            "part are not supported."
        )
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    rope: dict[str, Any] = {"rope_theta": float(theta)}
    if kind == "llama3":
        absent = [theirs for theirs in _ROPE.values() if theirs not in found]
        if absent:
            raise WeightsError(f"{file.origin}: rope_type='llama3' without {', '.join(absent)}.")
        rope |= {ours: found[theirs] for ours, theirs in _ROPE.items()}
    return rope


def _refuse(file: TensorFile) -> None:
    config = file.config
    hf_config.only_types(file, "llama", _TYPES)
    windows = config.get("layer_types") or ()
    windowed = "sliding_attention" in windows or config.get("use_sliding_window")
    # Qwen2 keeps a window in its settings that only `use_sliding_window` puts to use.
    if config.get("model_type") != "qwen2":
        windowed = windowed or config.get("sliding_window")
    if windowed:
        raise WeightsError(
            f"{file.origin}: config.json asks for attention in a sliding window "
            f"(sliding_window={config.get('sliding_window')}), which is not supported."
        )
    _rope(file)


def _biases(file: TensorFile) -> tuple[bool, bool]:
    """Returns whether queries, keys and values have biases, and whether the others have."""
    layer = f"{_prefix(file)}layers.0"
    inner = [f"{layer}.self_attn.o_proj", f"{layer}.mlp.gate_proj", f"{layer}.mlp.down_proj"]
    found = [f"{name}.bias" in file for name in inner]
    if any(found) and not all(found):
        raise WeightsError(
            f"{file.origin}: of {', '.join(inner)} some have biases and some have not, which is "
            "not supported."
        )
    return f"{layer}.self_attn.q_proj.bias" in file, all(found)


def _tied(file: TensorFile) -> bool:
    told = file.config.get("tie_word_embeddings")
    return told is True or (told is None and _HEAD not in file)


def _rules(file: TensorFile) -> Rules:
    _refuse(file)
    qkv_bias, use_bias = _biases(file)
    tied = _tied(file)
    return llama_rules(
        _prefix(file),
        qkv_bias=qkv_bias,
        use_bias=use_bias,
        word_aliases=(_HEAD,) if tied and _HEAD in file else (),
        head=not tied and _HEAD in file,
    )


def _settings(file: TensorFile) -> dict[str, Any]:
    _refuse(file)
    at = _prefix(file)
    layer = f"{at}layers.0"
    query, key = f"{layer}.self_attn.q_proj.weight", f"{layer}.self_attn.k_proj.weight"
    vocab_size, d_model = file.shape(f"{at}embed_tokens.weight")
    num_heads = hf_config.required_count(file, "num_attention_heads")
    head_dim = hf_config.divided(file, query, file.shape(query)[0], num_heads)
    qkv_bias, use_bias = _biases(file)
    found = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_layers": count_layers(file, f"{at}layers."),
        "num_heads": num_heads,
        "num_kv_heads": file.shape(key)[0] // head_dim,
        "head_dim": head_dim,
        "d_ff": file.shape(f"{layer}.mlp.gate_proj.weight")[0],
        "norm": "rms",
        "norm_eps": 1e-6,
        "activation": hf_config.activation(file, "hidden_act", "silu"),
        "gated": True,
        "use_bias": use_bias,
        "qkv_bias": qkv_bias,
        "tied_head": _tied(file),
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    told = {
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "attention_dropout_rate": "attention_dropout",
    }
    return found | _rope(file) | from_config(file, told)


FAMILIES = (Family("llama", detect=_detect, rules=_rules, settings=_settings),)
