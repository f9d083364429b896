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
    hf_electra_rules,
    hf_roberta_rules,
    rules_for,
    vcc_rules,
)
from jaxmodels.weights.converted import Converted, convert, is_converted, open_converted
from jaxmodels.weights.exporting import export_weights
from jaxmodels.weights.families import Family, detect, family_named, known_families
from jaxmodels.weights.files import read
from jaxmodels.weights.importing import import_tree, import_weights, leaf_sources, tree_of
from jaxmodels.weights.rules import Ignore, Rule, Rules
from jaxmodels.weights.safetensors_file import read_safetensors, save_safetensors
from jaxmodels.weights.sharded import load_sharded
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError
from jaxmodels.weights.torch_zip import read_torch
from jaxmodels.weights.transforms import IDENTITY, TRANSPOSE, Part, Transform

__all__ = [
    "load_sharded",
    "open_converted",
    "is_converted",
    "convert",
    "Converted",
    "IDENTITY",
    "TRANSPOSE",
    "Entry",
    "Family",
    "Ignore",
    "Layout",
    "Part",
    "Rule",
    "Rules",
    "TensorFile",
    "Transform",
    "WeightsError",
    "detect",
    "detect_family",
    "export_weights",
    "family_named",
    "hf_bert_rules",
    "hf_electra_rules",
    "hf_roberta_rules",
    "import_tree",
    "import_weights",
    "known_families",
    "leaf_sources",
    "read",
    "read_safetensors",
    "read_torch",
    "rules_for",
    "save_safetensors",
    "tree_of",
    "vcc_rules",
]
