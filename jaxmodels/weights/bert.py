"""Key tables of the BERT family: Hugging Face BERT and RoBERTa, and VCC's own layouts.

Our side is the tree of `jaxmodels.trunks.bert`; a layer's leaves are stacked over `{i}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from jaxmodels.weights.rules import TRANSPOSE, Ignore, Rule, Rules
from jaxmodels.weights.tensor_file import WeightsError

Family = Literal["hf_bert", "hf_roberta", "vcc"]
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


def _dense(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/kernel", TRANSPOSE),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


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
        make = _norm if ours.endswith("norm") else _dense
        rules += make(f"{prefix}encoder.layer.{{i}}.{theirs}", f"{root}encoder/layers/{ours}")
    if layer is _VCC_LAYER:
        rules += _norm(f"{prefix}encoder.LayerNorm", f"{root}encoder/final_norm")
    rules += _dense(f"{prefix}pooler.dense", f"{root}pooler")
    # Buffers that some versions saved: 0, 1, 2, ...
    rules += [
        Ignore(f"{prefix}embeddings.position_ids"),
        Ignore(f"{prefix}embeddings.token_type_ids"),
    ]
    return rules


def _mlm_head(
    dense: str, norm: str, decoder: str, bias: str, tied: bool, fallbacks: tuple[str, ...]
) -> list[Rule]:
    rules = [
        *_dense(dense, "mlm_head/dense"),
        *_norm(norm, "mlm_head/norm"),
        Rule(bias, "mlm_head/decoder/bias", aliases=(f"{decoder}.bias",)),
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
    rules += _dense(classifier, "classifier")
    for part in ("dense", "out_proj"):
        rules += _dense(f"{classifier}.{part}", f"classification/{part}")
    for ours, theirs in _HOTPOTQA.items():
        rules += _dense(f"{head_prefix}{theirs}.0", f"hotpotqa/{ours}/dense")
        rules += _dense(f"{head_prefix}{theirs}.2", f"hotpotqa/{ours}/out_proj")
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
            (f"{prefix}{_WORD}",),
        ),
        *_dense(f"{head_prefix}classifier", "classifier"),
        Ignore(f"{head_prefix}cls.seq_relationship.*"),
    ]
    return _with_optional(rules, trunk, optional)


def hf_roberta_rules(
    *,
    prefix: str = "",
    head_prefix: str = "",
    trunk: str = "",
    tied: bool = False,
    optional: Collection[str] = ("pooler",),
) -> Rules:
    """Returns the table of Hugging Face's RoBERTa and of its heads; VCC's post-norm baseline too.

    Position tables keep their `max_position_embeddings` rows (the tokens' limit + 2). A file that
    left out the tied `lm_head.decoder.weight` gives its word embeddings as our decoder kernel.

    Args: as `hf_bert_rules`; `prefix` is "roberta." inside a model with a head.
    """
    decoder = f"{head_prefix}lm_head.decoder.weight"
    rules = [
        *_trunk(prefix, trunk, _HF_LAYER, (decoder,) if tied else ()),
        *_roberta_heads(head_prefix, tied, (f"{prefix}{_WORD}",)),
    ]
    return _with_optional(rules, trunk, optional)


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

    family: Family
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
    head_prefix = prefix.removesuffix("roberta.").removesuffix("bert.")
    family: Family = "hf_bert"
    if any(key.startswith(f"{prefix}encoder.layer.") and ".FFN." in key for key in keys):
        family = "vcc"
    elif prefix.endswith("roberta.") or any(k.startswith(f"{head_prefix}lm_head.") for k in keys):
        family = "hf_roberta"
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
    layout = detect_family(keys)
    tree = template or {}
    trunk = "trunk" if "trunk" in tree else ""
    where = {"prefix": layout.prefix, "head_prefix": layout.head_prefix, "trunk": trunk}
    if layout.family == "vcc":
        return vcc_rules(**where, optional=optional)
    tied = "mlm_head" in tree and "kernel" not in tree["mlm_head"].get("decoder", {})
    make = hf_bert_rules if layout.family == "hf_bert" else hf_roberta_rules
    return make(**where, tied=tied, optional=optional)
