"""Whole trunks to plan memory for.

    python -m train.compile --config=benchmarks/trunk_config.py:t5_3b --topology=v5e:4x4

Presets: t5_base, t5_3b (512 + 128 tokens) and vit_l14 (224 pixels), bfloat16 products, float32
parameters and AdamW. Any other size: --config.model.size=flan_t5_xxl.
"""

from ml_collections import ConfigDict

from configs.fields import COMMON, Field, positive, preset

FIELDS = COMMON | {
    "model.size": Field("t5_base", "key of trunks.t5.SIZES or trunks.clip.SIZES"),
    "model.dtype": Field("bfloat16", "of matrix products", choices=("float32", "bfloat16")),
    "model.remat": Field(
        "full",
        "what the backward pass recomputes",
        choices=("none", "full", "dots", "dots_no_batch"),
    ),
    "data.length": Field(512, "t5: tokens of the input", positive),
    "data.target_length": Field(128, "t5: tokens of the target", positive),
    "data.num_classes": Field(1000, "images: classes", positive),
}
_COMMON = {"method": "benchmarks.trunk_task", "total_steps": 1000}
PRESETS = {
    "t5_base": _COMMON | {"model.size": "t5_base", "batch_size": 128},
    "t5_3b": _COMMON | {"model.size": "t5_3b", "batch_size": 32},
    "vit_l14": _COMMON | {"model.size": "vit_l14", "batch_size": 256},
}


def get_config(name: str = "t5_base") -> ConfigDict:
    """Returns the preset called `name`."""
    return preset(FIELDS, PRESETS, name)
