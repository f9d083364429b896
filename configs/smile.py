"""SMILE: python -m train.main --config=configs/smile.py:quickstart --workdir=/tmp/smile

Routing is defined on a grid of moe.nodes x moe.devices cells; a mesh whose axes divide it gives the
same results on any number of devices. On eight simulated CPU devices:
  XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m train.main \\
    --config=configs/smile.py:quickstart --config.mesh.node=2 --workdir=/tmp/smile

Presets:
  quickstart           bi-level routing on Python's documentation, masked LM.
  quickstart_one_level the same with Switch's one-level routing.
  quickstart_dense     the same without experts, of equal work a token.
  debug                quickstart's model at its smallest, a few steps.
  smile_3_7b           the paper's 3.7B: 128 experts on 16 nodes of 8 devices.
  smile_13b            its 13B.
  smile_48b            its 48B.
  switch_3_7b          3.7B with one-level routing.
  switch_13b           13B with it.
  switch_48b           48B with it.
  dense_110m           the dense model of 3.7B's shape.
The large ones train on --config.data.files=FILE,... (text; jsonl with --config.data.field),
or with --config.data.name=c4 on C4 as TFDS prepares it, in --config.data.dir.
"""

from ml_collections import ConfigDict

from configs import fields
from configs.fields import (
    COMMON,
    Field,
    at_least,
    below_one,
    fraction,
    non_negative,
    positive,
)

MODEL_FIELDS = {
    "model.vocab_size": Field(30522, "rows of the word table", positive),
    "model.d_model": Field(768, "width of the residual stream", positive),
    "model.num_layers": Field(12, "transformer layers; every second has experts", positive),
    "model.num_heads": Field(12, "attention heads; divides d_model", positive),
    "model.d_ff": Field(3072, "inner width of the feed-forward and of each expert", positive),
    "model.max_positions": Field(512, "longest input, tokens", positive),
    "model.num_token_types": Field(2, "rows of the token-type table", positive),
    "model.norm_order": Field("post", "norm before or after each branch", choices=("pre", "post")),
    "model.norm_eps": Field(1e-12, "epsilon of the layer norms", positive),
    "model.dropout_rate": Field(0.1, "dropout of embeddings and branches", below_one),
    "model.attention_dropout_rate": Field(0.1, "dropout of attention weights", below_one),
    "model.remat": Field(
        "none",
        "what the backward pass recomputes",
        choices=("none", "full", "dots", "dots_no_batch"),
    ),
    "model.dtype": Field("float32", "of matrix products", choices=("float32", "bfloat16")),
}

MOE_FIELDS = {
    "moe.num_experts": Field(128, "E, experts of an MoE layer; 0: a dense model", non_negative),
    "moe.nodes": Field(16, "n, nodes of the grid that routing is defined on", positive),
    "moe.devices": Field(8, "m, devices of a node of the grid", positive),
    "moe.routing": Field(
        "bi_level", "to a node, then inside it; or at once", choices=("bi_level", "one_level")
    ),
    "moe.transport": Field(
        "auto",
        "one exchange over all devices, one an axis, or dropless",
        choices=("auto", "flat", "two_hop", "ragged"),
    ),
    "moe.allow_mixed_nodes": Field(
        False, "nodes of the mesh may mix TPU slices or hosts", may_change=True
    ),
    "moe.capacity_factor": Field(
        1.25, "slots of a bucket by an even share; none: dropless", positive, optional=True
    ),
    "moe.eval_capacity_factor": Field(2.0, "the same in evaluation", positive, optional=True),
    "moe.capacity_factor_intra": Field(
        None, "of the second level; none: as the first", positive, kind=float
    ),
    "moe.buffer_factor": Field(2.0, "dropless: rows of a buffer by tokens", positive),
    "moe.intra_router": Field(
        "shared", "one intra router for all nodes, or one each", choices=("shared", "per_node")
    ),
    "moe.jitter": Field(0.01, "noise on the routers' input while training", below_one),
    "moe.stats": Field(
        "device",
        "rows a balance loss is taken over",
        choices=("device", "device_mean", "global"),
    ),
    "moe.alpha": Field(0.01, "weight of the (inter) router's balance loss", non_negative),
    "moe.beta": Field(0.01, "weight of the intra router's balance loss", non_negative),
    "moe.z_coef": Field(0.0, "weight of the router z-loss", non_negative),
}

DATA_FIELDS = {
    "data.name": Field("text_lines", "data set", choices=("text_lines", "pydoc_text", "c4")),
    "data.length": Field(128, "tokens a window", at_least(8)),
    "data.mask_rate": Field(0.15, "share of the tokens that are predicted", fraction),
    "data.files": Field((), "text_lines: files or globs to train on", items=str),
    "data.validation_files": Field((), "text_lines: files or globs to evaluate on", items=str),
    "data.field": Field(None, "text_lines: field of jsonl rows that holds the text", kind=str),
    "data.tokenizer": Field(
        None, "tokenizer.json; None: text_lines trains a BPE on the files, c4 needs one", kind=str
    ),
}

FIELDS = COMMON | MODEL_FIELDS | MOE_FIELDS | DATA_FIELDS

_ADAMW = {
    "method": "smile",
    "optimizer.schedule": "linear",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
}

_QUICKSTART = _ADAMW | {
    "total_steps": 300,
    "batch_size": 32,
    "eval_every": 100,
    "checkpoint_every": 150,
    "log_every": 10,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 30,
    "model.vocab_size": 1000,
    "model.d_model": 64,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.d_ff": 128,
    "model.max_positions": 64,
    "model.norm_order": "pre",
    "model.num_token_types": 1,
    "model.dropout_rate": 0.0,
    "model.attention_dropout_rate": 0.0,
    "moe.num_experts": 8,
    "moe.nodes": 2,
    "moe.devices": 4,
    "data.name": "pydoc_text",
    "data.length": 64,
}

_LARGE = _ADAMW | {
    "total_steps": 500_000,
    "batch_size": 8192,
    "eval_every": 5000,
    "checkpoint_every": 5000,
    "log_every": 100,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 10_000,
    "model.dtype": "bfloat16",
}

_SHAPES = {
    "3_7b": {},
    "13b": {
        "model.d_model": 1024,
        "model.num_layers": 24,
        "model.num_heads": 16,
        "model.d_ff": 4096,
    },
    "48b": {
        "model.d_model": 1600,
        "model.num_layers": 36,
        "model.num_heads": 25,
        "model.d_ff": 6400,
    },
}

_ONE_LEVEL = {"moe.routing": "one_level"}

PRESETS = {
    "quickstart": _QUICKSTART,
    "quickstart_one_level": _QUICKSTART | _ONE_LEVEL,
    "quickstart_dense": _QUICKSTART | {"moe.num_experts": 0},
    "debug": _QUICKSTART
    | {
        "total_steps": 10,
        "eval_every": 0,
        "checkpoint_every": 5,
        "log_every": 1,
        "batch_size": 8,
        "optimizer.warmup_steps": 2,
    },
    "dense_110m": _LARGE | {"moe.num_experts": 0},
    **{f"smile_{name}": _LARGE | shape for name, shape in _SHAPES.items()},
    **{f"switch_{name}": _LARGE | shape | _ONE_LEVEL for name, shape in _SHAPES.items()},
}


def get_config(preset: str = "quickstart") -> ConfigDict:
    """Returns the config of a preset; `--print_config` explains every field."""
    return fields.preset(FIELDS, PRESETS, preset)
