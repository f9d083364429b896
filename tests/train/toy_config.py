"""Config of the toy method.

python -m train.main --config=tests/train/toy_config.py:quickstart --workdir=/tmp/toy
"""

from ml_collections import ConfigDict

from configs.fields import COMMON, Field, positive, preset

FIELDS = COMMON | {
    "model.width": Field(64, "width of every layer", positive),
    "model.dropout": Field(0.1, "share of values dropped"),
    "model.frozen": Field("", "beginning of the paths that stay as they are"),
    "model.poison": Field("", "what is spoilt in the batch of `poison_step`: see toy.py"),
    "model.poison_step": Field(7, "the step whose batch is spoilt"),
    "data.length": Field(8, "longest sequence", positive),
    "data.examples": Field(256, "training examples", positive),
    "data.repeat": Field(100, "times they are gone through"),
    "data.half_steps": Field(0, "first steps with sequences of half the length"),
    "optimizer.multiplier.head": Field(1.0, "share of the learning rate of the last layer"),
}
PRESETS = {
    "quickstart": {
        "method": "tests.train.toy",
        "total_steps": 20,
        "batch_size": 16,
        "log_every": 1,
        "optimizer.learning_rate": 0.01,
        "optimizer.warmup_steps": 4,
    },
}


def get_config(name: str = "quickstart") -> ConfigDict:
    """Returns the preset called `name`."""
    return preset(FIELDS, PRESETS, name)
