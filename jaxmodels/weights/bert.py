"""Key tables of the BERT family: Hugging Face BERT, RoBERTa and ELECTRA, and VCC's own layouts.

Our side is the tree of `jaxmodels.trunks.bert`; a layer's leaves are stacked over `{i}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from jaxmodels.weights.families import Family, count_layers, from_config
from jaxmodels.weights.rules import Ignore, Rule, Rules, dense, drop_absent
from jaxmodels.weights.tensor_file import TensorFile, WeightsError
from jaxmodels.weights.transforms import TRANSPOSE

Kind = Literal["hf_bert", "hf_roberta", "hf_electra", "vcc"]
_WORD = "embeddings.word_embeddings.weight"

# Our sublayer -> foreign module, of one layer.
_HF_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn/wi": "intermediate.dense",
    "ffn/wo": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_VCC_LAYER = {
    "attention_norm": "attention.LayerNorm",
    "attention/query": "attention.query",
    "attention/key": "attention.key",
    "attention/value": "attention.value",
    "attention/out": "attention.dense",
    "ffn_norm": "FFN.0",
    "ffn/wi": "FFN.1",
    "ffn/wo": "FFN.3",
}
_HOTPOTQA = {
    "paragraph": "para_classifier",
    "sentence": "sent_classifier",
    "answer_type": "cls_classifier",
    "span": "ans_classifier",
}


def _norm(source: str, target: str) -> list[Rule]:
    # gamma and beta: the names in files converted from the first TensorFlow checkpoints.
    return [
        Rule(f"{source}.weight", f"{target}/scale", fallbacks=(f"{source}.gamma",)),
        Rule(f"{source}.bias", f"{target}/bias", fallbacks=(f"{source}.beta",)),
    ]


def _trunk(prefix: str, trunk: str, layer: Mapping[str, str], tied_word: tuple[str, ...]) -> Rules:
    root = f"{trunk}/" if trunk else ""
    rules: list[Rule | Ignore] = [
        Rule(f"{prefix}{_WORD}", f"{root}embeddings/word/embedding", aliases=tied_word),
    ]
    for name in ("position", "token_type"):
        source = f"{prefix}embeddings.{name}_embeddings.weight"
        rules.append(Rule(source, f"{root}embeddings/{name}/embedding"))
    rules += _norm(f"{prefix}embeddings.LayerNorm", f"{root}embeddings/norm")
    for ours, theirs in layer.items():
        make = _norm if ours.endswith("norm") else dense
        rules += make(f"{prefix}encoder.layer.{{i}}.{theirs}", f"{root}encoder/layers/{ours}")
    if layer is _VCC_LAYER:
        rules += _norm(f"{prefix}encoder.LayerNorm", f"{root}encoder/final_norm")
    rules += dense(f"{prefix}pooler.dense", f"{root}pooler")
    # Buffers that some versions saved: 0, 1, 2, ...
    rules += [
        Ignore(f"{prefix}embeddings.position_ids"),
        Ignore(f"{prefix}embeddings.token_type_ids"),
    ]
    return rules


def _mlm_head(
    hidden: str, norm: str, decoder: str, bias: str, tied: bool, fallbacks: tuple[str, ...]
) -> list[Rule]:
    # Who does not tie the kernel does not tie the bias either.
    twice = (f"{decoder}.bias",)
    copies = () if tied or fallbacks else twice
    rules = [
        *dense(hidden, "mlm_head/dense"),
        *_norm(norm, "mlm_head/norm"),
        Rule(bias, "mlm_head/decoder/bias", aliases=twice, copies=copies),
    ]
    if not tied:
        kernel = Rule(
            f"{decoder}.weight", "mlm_head/decoder/kernel", TRANSPOSE, fallbacks=fallbacks
        )
        rules.append(kernel)
    return rules


def _roberta_heads(head_prefix: str, tied: bool, fallbacks: tuple[str, ...]) -> list[Rule]:
    mlm = f"{head_prefix}lm_head."
    classifier = f"{head_prefix}classifier"
    rules = _mlm_head(
        f"{mlm}dense", f"{mlm}layer_norm", f"{mlm}decoder", f"{mlm}bias", tied, fallbacks
    )
    rules += dense(classifier, "classifier")
    for part in ("dense", "out_proj"):
        rules += dense(f"{classifier}.{part}", f"classification/{part}")
    for ours, theirs in _HOTPOTQA.items():
        rules += dense(f"{head_prefix}{theirs}.0", f"hotpotqa/{ours}/dense")
        rules += dense(f"{head_prefix}{theirs}.2", f"hotpotqa/{ours}/out_proj")
    return rules


def _with_optional(rules: Rules, trunk: str, optional: Collection[str]) -> Rules:
    """Marks the rules under the given paths (relative to the trunk or to the model) optional."""
    roots = {root for name in optional for root in (name, f"{trunk}/{name}" if trunk else name)}

    def mark(rule: Rule | Ignore) -> Rule | Ignore:
        if isinstance(rule, Rule) and any(f"{rule.target}/".startswith(f"{r}/") for r in roots):
            return dataclasses.replace(rule, optional=True)
        return rule

    return tuple(mark(rule) for rule in rules)


def hf_bert_rules(
    *,
    prefix: str = "",
    head_prefix: str = "",
    trunk: str = "",
    tied: bool = False,
    own_decoder: bool = False,
    optional: Collection[str] = ("pooler",),
) -> Rules:
    """Returns the table of Hugging Face's BERT: `BertModel`, and `BertForMaskedLM`'s head.

    `attention_norm` is `attention.output.LayerNorm`, `ffn_norm` is `output.LayerNorm` (post-norm).
    The next-sentence head of `BertForPreTraining` has no place in our tree and is left out.

    Args:
      prefix: before the trunk's keys: "" for BertModel, "bert." inside a model with a head.
      head_prefix: before `cls.predictions` and `classifier`.
      trunk: path of the trunk in our tree: "" if it is the tree, "trunk" in a model with a head.
      tied: the decoder is the word embedding (our tree has no `mlm_head/decoder/kernel`).
      own_decoder: theirs is not tied either (`tie_word_embeddings` is false): kernel and bias are
        written whatever they hold. Else a kernel that equals the word embedding is left out, and
        a file without one gives its word embeddings as our kernel.
      optional: our paths whose tensors may be in a file although the model has no such leaf.
    """
    mlm = f"{head_prefix}cls.predictions."
    rules = [
        *_trunk(prefix, trunk, _HF_LAYER, (f"{mlm}decoder.weight",) if tied else ()),
        *_mlm_head(
            f"{mlm}transform.dense",
            f"{mlm}transform.LayerNorm",
            f"{mlm}decoder",
            f"{mlm}bias",
            tied,
            () if own_decoder else (f"{prefix}{_WORD}",),
        ),
        *dense(f"{head_prefix}classifier", "classifier"),
        Ignore(f"{head_prefix}cls.seq_relationship.*"),
    ]
    return _with_optional(rules, trunk, optional)


def hf_roberta_rules(
    *,
    prefix: str = "",
    head_prefix: str = "",
    trunk: str = "",
    tied: bool = False,
    own_decoder: bool = False,
    optional: Collection[str] = ("pooler",),
) -> Rules:
    """Returns the table of Hugging Face's RoBERTa and of its heads; VCC's post-norm baseline too.

    Position tables keep their `max_position_embeddings` rows (the tokens' limit + 2).

    Args: as `hf_bert_rules`; `prefix` is "roberta." inside a model with a head.
    """
    decoder = f"{head_prefix}lm_head.decoder.weight"
    rules = [
        *_trunk(prefix, trunk, _HF_LAYER, (decoder,) if tied else ()),
        *_roberta_heads(head_prefix, tied, () if own_decoder else (f"{prefix}{_WORD}",)),
    ]
    return _with_optional(rules, trunk, optional)


def hf_electra_rules(*, prefix: str = "", head_prefix: str = "", trunk: str = "") -> Rules:
    """Returns the table of Hugging Face's ELECTRA: `ElectraModel`, and the discriminator's head.

    BERT without a pooler; word, position and type embeddings may be narrower than the layers, then
    `embeddings_project` widens them.

    Args:
      prefix: before the trunk's keys: "electra." inside a model with a head.
      head_prefix: before `discriminator_predictions`.
      trunk: path of the trunk in our tree: "" if it is the tree, "trunk" in a model with a head.
    """
    root = f"{trunk}/" if trunk else ""
    head = f"{head_prefix}discriminator_predictions"
    return [
        *_trunk(prefix, trunk, _HF_LAYER, ()),
        *dense(f"{prefix}embeddings_project", f"{root}embeddings_project", optional=True),
        *dense(f"{head}.dense", "discriminator/dense"),
        *dense(f"{head}.dense_prediction", "discriminator/out_proj"),
    ]


def vcc_rules(
    *,
    norm: Literal["pre", "post"] = "pre",
    prefix: str = "roberta.",
    head_prefix: str = "",
    trunk: str = "trunk",
    optional: Collection[str] = (),
) -> Rules:
    """Returns the table of VCC's RoBERTa (local and VCC layers alike) and of its heads.

    Args:
      norm: "pre": VCC and its pre-norm baseline; "post": its post-norm baseline.
      prefix: before the trunk's keys: "roberta." in a model with a head, "" for a bare encoder.
      head_prefix: before `lm_head`, `classifier`, `para_classifier`, ...
      trunk: path of the trunk in our tree: "" if it is the tree, "trunk" in a model with a head.
      optional: our paths whose tensors may be in a file although the model has no such leaf.
    """
    if norm not in ("pre", "post"):
        raise WeightsError(f"norm={norm!r} is neither 'pre' nor 'post'.")
    layer = _VCC_LAYER if norm == "pre" else _HF_LAYER
    # The decoder is never tied to the word embeddings here: no fallback.
    rules = [*_trunk(prefix, trunk, layer, ()), *_roberta_heads(head_prefix, False, ())]
    return _with_optional(rules, trunk, optional)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the keys of a checkpoint tell.

    Attributes:
      family: the table to use. VCC's post-norm baseline has RoBERTa's keys and counts as such.
      prefix: before the trunk's keys, e.g. "bert.", "roberta.", "module.roberta.", "".
      head_prefix: before the heads' keys: `prefix` without the model's own name.
    """

    family: Kind
    prefix: str
    head_prefix: str


def detect_family(keys: Iterable[str]) -> Layout:
    """Tells family and prefixes from the keys of a checkpoint.

    Raises:
      WeightsError: the keys hold no word embeddings of the family, or those of several models.
    """
    keys = set(keys)
    found = sorted(key[: -len(_WORD)] for key in keys if key.endswith(_WORD))
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if len(found) != 1:
        raise WeightsError(
            f"{len(found)} trunks of the BERT family (keys ending in {_WORD!r})"
            + (f", under {found}: choose one by .under(prefix)." if found else ".")
        )
    (prefix,) = found
    head_prefix = prefix
    for own in ("roberta.", "bert.", "electra."):
        head_prefix = head_prefix.removesuffix(own)
    family: Kind = "hf_bert"
    if any(key.startswith(f"{prefix}encoder.layer.") and ".FFN." in key for key in keys):
        family = "vcc"
    elif prefix.endswith("roberta.") or any(k.startswith(f"{head_prefix}lm_head.") for k in keys):
        family = "hf_roberta"
    elif prefix.endswith("electra.") or f"{prefix}embeddings_project.weight" in keys:
        family = "hf_electra"
    return Layout(family, prefix, head_prefix)


def rules_for(
    keys: Iterable[str], template: Any = None, *, optional: Collection[str] = ("pooler",)
) -> Rules:
    """Returns the table for a checkpoint of the BERT family, decided from its keys.

    Args:
      keys: the checkpoint's keys.
      template: our tree; tells whether the trunk is under "trunk" and whether the MLM decoder is
        tied. None: a bare trunk.
      optional: our paths whose tensors may be in the file although the model has no such leaf;
        add "mlm_head" to take only the trunk of a pretraining checkpoint.

    Raises:
      WeightsError: as `detect_family`.
    """
    config = keys.config if isinstance(keys, TensorFile) else {}
    keys = set(keys)
    layout = detect_family(keys)
    tree = template or {}
    trunk = "trunk" if "trunk" in tree else ""
    where = {"prefix": layout.prefix, "head_prefix": layout.head_prefix, "trunk": trunk}
    if layout.family == "hf_electra":
        return _with_optional(hf_electra_rules(**where), trunk, optional)
    if layout.family != "vcc":
        where["tied"] = "mlm_head" in tree and "kernel" not in tree["mlm_head"].get("decoder", {})
        where["own_decoder"] = _own_decoder(layout, keys, config)
    return _MAKE[layout.family](**where, optional=optional)


def _own_decoder(layout: Layout, keys: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a head has a kernel of its own; where a config.json does not say so, it is tied."""
    head = "cls.predictions" if layout.family == "hf_bert" else "lm_head"
    return f"{layout.head_prefix}{head}.decoder.weight" in keys and (
        not config or config.get("tie_word_embeddings") is False
    )


_HEADS = ("mlm_head", "classifier/kernel", "classifier/bias", "classification", "hotpotqa")
_HEADS += ("discriminator",)
# How families call themselves in config.json; a bare RoBERTa has no other mark.
_MODEL_TYPES = {"roberta": "hf_roberta", "xlm-roberta": "hf_roberta", "electra": "hf_electra"}
_CONFIG = {"num_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
_MAKE = {
    "hf_bert": hf_bert_rules,
    "hf_roberta": hf_roberta_rules,
    "hf_electra": hf_electra_rules,
    "vcc": vcc_rules,
}


def _layout(file: TensorFile) -> Layout | None:
    """Returns what keys and config.json tell, or None for a file of another kind."""
    try:
        layout = detect_family(file)
    except WeightsError:
        return None
    first = f"{layout.prefix}encoder.layer.0.attention."
    if not any(f"{first}{name}.weight" in file for name in ("self.query", "query")):
        return None
    named = _MODEL_TYPES.get(str(file.config.get("model_type")))
    if layout.family == "hf_bert" and not layout.prefix and named:
        layout = dataclasses.replace(layout, family=named)
    return layout


def _file_rules(file: TensorFile) -> Rules:
    """Returns the table of just the parts that a file has; with a head, the trunk is `trunk`."""
    layout = _layout(file) or detect_family(file)
    where: dict[str, Any] = {"prefix": layout.prefix, "head_prefix": layout.head_prefix}
    if layout.family in ("hf_bert", "hf_roberta"):
        where["own_decoder"] = _own_decoder(layout, file, file.config)
    rules = drop_absent(_MAKE[layout.family](**where, trunk="trunk"), file, _HEADS)
    heads = any(isinstance(r, Rule) and not r.target.startswith("trunk/") for r in rules)
    if not heads:
        rules = drop_absent(_MAKE[layout.family](**where, trunk=""), file, _HEADS)
    parts = ("pooler", "embeddings_project", "encoder/final_norm")
    rules = drop_absent(rules, file, [f"trunk/{part}" if heads else part for part in parts])
    # Only where the model has no such leaf did `optional` matter; what is left here must be there.
    return [dataclasses.replace(r, optional=False) if isinstance(r, Rule) else r for r in rules]


def _settings(file: TensorFile) -> dict[str, Any]:
    """Returns the fields of `BertConfig` that a file tells."""
    layout = _layout(file) or detect_family(file)
    at = layout.prefix
    table = f"{at}embeddings.{{}}_embeddings.weight".format
    inner = "FFN.1" if layout.family == "vcc" else "intermediate.dense"
    d_ff, d_model = file.shape(f"{at}encoder.layer.0.{inner}.weight")
    offset = 2 if layout.family in ("hf_roberta", "vcc") else 0
    found: dict[str, Any] = {
        "vocab_size": file.shape(table("word"))[0],
        "d_model": d_model,
        "num_layers": count_layers(file, f"{at}encoder.layer."),
        "d_ff": d_ff,
        "max_positions": file.shape(table("position"))[0] - offset,
        "num_token_types": file.shape(table("token_type"))[0],
        "norm_order": "pre" if layout.family == "vcc" else "post",
        "norm_eps": 1e-5 if offset else 1e-12,
        "position_offset": offset,
        "pooler": f"{at}pooler.dense.weight" in file,
    }
    if f"{at}embeddings_project.weight" in file:
        found["embedding_size"] = file.shape(table("word"))[1]
    return found | from_config(file, _CONFIG)


def _family(name: str, kind: Kind) -> Family:
    def matches(file: TensorFile) -> int:
        layout = _layout(file)
        return 2 * (layout is not None and layout.family == kind)

    return Family(name, matches, _file_rules, _settings)


FAMILIES = (
    _family("bert", "hf_bert"),
    _family("electra", "hf_electra"),
    _family("roberta", "hf_roberta"),
    _family("vcc", "vcc"),
)
