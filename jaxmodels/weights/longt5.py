"""Key table of Hugging Face's LongT5 encoders: T5's, with the attention and its norm renamed."""

import dataclasses

from jaxmodels.weights.rules import Ignore, Rule, Rules, norm
from jaxmodels.weights.t5 import t5_rules
from jaxmodels.weights.tensor_file import TensorFile, WeightsError

_KINDS = ("TransientGlobalSelfAttention", "LocalSelfAttention")


def longt5_rules(file: TensorFile) -> Rules:
    """Returns the table of a LongT5 file, for `vcc.baseline_attentions.SparseT5`.

    Args:
      file: of `LongT5ForConditionalGeneration`, `LongT5Model` or `LongT5EncoderModel`.

    Raises:
      WeightsError: it has neither of LongT5's attentions.
    """
    first = "encoder.block.0.layer.0."
    kind = next((kind for kind in _KINDS if f"{first}{kind}.q.weight" in file), None)
    if kind is None:
        raise WeightsError(f"{file.origin} has no {' or '.join(_KINDS)} under {first}")
    rules = t5_rules(
        gated="encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in file,
        tied_head="lm_head.weight" not in file,
        decoder="decoder.block.0.layer.0.SelfAttention.q.weight" in file,
    )
    rules = [_renamed(rule, kind) for rule in rules]
    if kind == _KINDS[0]:
        table = f"{first}{kind}.global_relative_attention_bias.weight"
        rules.append(Rule(table, "encoder/global_relative_bias/embedding"))
        source = f"encoder.block.{{i}}.layer.0.{kind}.global_input_layer_norm"
        rules += norm(source, "encoder/layers/global_norm", bias=False)
    return rules


def _renamed(rule: Rule | Ignore, kind: str) -> Rule | Ignore:
    if isinstance(rule, Ignore) or not rule.source.startswith("encoder.block."):
        return rule
    return dataclasses.replace(rule, source=rule.source.replace("SelfAttention", kind))
