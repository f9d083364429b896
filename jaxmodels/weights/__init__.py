"""Weights in and out: files read without running code, and tables of foreign parameter names.

    loaded = weights.load("flan-t5-base")  # family, settings of the trunk, parameters

    file = weights.read("flan-t5-base")
    rules = weights.detect(file).rules(file)
    params = weights.import_weights(template, file, rules)  # into a model of one's own
    weights.save_safetensors("out.safetensors", weights.export_weights(params, rules))

`python -m jaxmodels.weights inspect FILE` shows what a file holds, `convert` makes a checkpoint of
it for `--config.init_from`.
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
from jaxmodels.weights.loading import Loaded, load
from jaxmodels.weights.rules import Ignore, Rule, Rules
from jaxmodels.weights.safetensors_file import read_safetensors, save_safetensors
from jaxmodels.weights.sharded import load_sharded
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError
from jaxmodels.weights.torch_zip import read_torch
from jaxmodels.weights.transforms import IDENTITY, TRANSPOSE, Part, Transform

__all__ = [
    "IDENTITY",
    "TRANSPOSE",
    "Converted",
    "Entry",
    "Family",
    "Ignore",
    "Layout",
    "Loaded",
    "Part",
    "Rule",
    "Rules",
    "TensorFile",
    "Transform",
    "WeightsError",
    "convert",
    "detect",
    "detect_family",
    "export_weights",
    "family_named",
    "hf_bert_rules",
    "hf_electra_rules",
    "hf_roberta_rules",
    "import_tree",
    "import_weights",
    "is_converted",
    "known_families",
    "leaf_sources",
    "load",
    "load_sharded",
    "open_converted",
    "read",
    "read_safetensors",
    "read_torch",
    "rules_for",
    "save_safetensors",
    "tree_of",
    "vcc_rules",
]
