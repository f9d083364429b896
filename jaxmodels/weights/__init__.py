"""Weights in and out: files read without running code, and tables of foreign parameter names.

    tensors = weights.read("model.safetensors")
    params = weights.import_weights(template, tensors, weights.rules_for(tensors, template))
    weights.save_safetensors("out.safetensors", weights.export_weights(params, rules))

`python -m jaxmodels.weights inspect FILE` lists what a file holds.
"""

from jaxmodels.weights.bert import (
    Layout,
    detect_family,
    hf_bert_rules,
    hf_roberta_rules,
    rules_for,
    vcc_rules,
)
from jaxmodels.weights.files import read
from jaxmodels.weights.rules import (
    IDENTITY,
    TRANSPOSE,
    Ignore,
    Rule,
    Rules,
    Transform,
    export_weights,
    import_weights,
)
from jaxmodels.weights.safetensors_file import read_safetensors, save_safetensors
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError
from jaxmodels.weights.torch_zip import read_torch

__all__ = [
    "IDENTITY",
    "TRANSPOSE",
    "Entry",
    "Ignore",
    "Layout",
    "Rule",
    "Rules",
    "TensorFile",
    "Transform",
    "WeightsError",
    "detect_family",
    "export_weights",
    "hf_bert_rules",
    "hf_roberta_rules",
    "import_weights",
    "read",
    "read_safetensors",
    "read_torch",
    "rules_for",
    "save_safetensors",
    "vcc_rules",
]
