"""VCC: python -m train.main --config=configs/vcc.py:quickstart --workdir=/tmp/vcc

Presets (section 7 of the paper's own configurations):
  quickstart           VCC answers questions about 4,096-token documents (pydoc_facts).
  quickstart_dense     its dense twin: each VCC layer replaced by full attention.
  roberta_base_4k      VCC-RoBERTa base, cluster-permuted masked LM on your text, 4,096 tokens.
  roberta_large_4k     the same, large.
  roberta_base_512     dense post-norm RoBERTa base, masked LM, 512 tokens.
  roberta_base_4k_dense  dense pre-norm RoBERTa base, masked LM, 4,096 tokens.
The roberta_* presets train on --config.data.files=FILE,... (text; jsonl with --config.data.field).
"""

from ml_collections import ConfigDict

from configs import fields
from configs.fields import (
    COMMON,
    Field,
    at_least,
    below_one,
    each,
    fraction,
    non_negative,
    one_of,
    positive,
)

KINDS = ("local", "vcc", "dense")

# How the encoder compresses, whatever the trunk.
VCC_FIELDS = {
    "model.encoder": Field("vcc", "kind of the layers after the local ones", choices=KINDS),
    "model.num_local_layers": Field(4, "first layers, on independent segments", non_negative),
    "model.layer_kinds": Field(
        (),
        "kind of every layer; empty: local ones, then `encoder`",
        each(one_of(*KINDS)),
        items=str,
    ),
    "model.segment_length": Field(512, "g, tokens a local segment", positive),
    "model.num_vip": Field(320, "p, VIP slots", positive),
    "model.block_size": Field(16, "b, tokens a block", positive),
    "model.num_fine_blocks": Field(44, "k, blocks opened a layer", non_negative),
    "model.selector": Field("attention", "how blocks are chosen", choices=("attention", "random")),
    "model.explore_prob": Field(0.1, "chance of a random choice while training", fraction),
    "model.scale_correction": Field(True, "coarse keys count log(block size) more"),
    "model.exact_counts": Field(
        False, "a partly padded block counts its real tokens (the official code: b)"
    ),
    "model.vote_average": Field(
        "slots",
        "what a block's votes are divided by: all slots (official), or the VIP tokens there are",
        choices=("slots", "vips"),
    ),
    "model.layout": Field(
        "static", "keep all coarse rows, or gather", choices=("static", "gather")
    ),
    "model.overflow": Field(
        "error", "more VIP tokens than slots", choices=("error", "warn", "demote")
    ),
}

MODEL_FIELDS = {
    "model.vocab_size": Field(50265, "rows of the word table", positive),
    "model.d_model": Field(768, "width of the residual stream", positive),
    "model.num_layers": Field(12, "transformer layers", positive),
    "model.num_heads": Field(12, "attention heads; divides d_model", positive),
    "model.d_ff": Field(3072, "inner width of the feed-forward", positive),
    "model.max_positions": Field(4096, "longest input, tokens", positive),
    "model.num_token_types": Field(128, "rows of the token-type table", positive),
    "model.norm_order": Field("pre", "norm before or after each branch", choices=("pre", "post")),
    "model.norm_eps": Field(1e-5, "epsilon of the layer norms", positive),
    "model.dropout_rate": Field(0.1, "dropout of embeddings and branches", below_one),
    "model.attention_dropout_rate": Field(0.1, "dropout of attention weights", below_one),
    "model.remat": Field(
        "none",
        "what the backward pass recomputes",
        choices=("none", "full", "dots", "dots_no_batch"),
    ),
    "model.attention": Field(
        "auto", "attention implementation", choices=("auto", "xla", "chunked", "cudnn")
    ),
    "model.dtype": Field("float32", "of matrix products", choices=("float32", "bfloat16")),
    "model.positions": Field(
        "text",
        "position ids run through the text, or restart in every local segment",
        choices=("text", "segment"),
    ),
    "model.init": Field("normal", "start of the parameters", choices=("normal", "copying")),
}

FACTS_FIELDS = {
    "data.questions": Field(1, "pydoc_facts: questions a document", at_least(1)),
    "data.fact_groups": Field(8, "pydoc_facts: groups of four facts", at_least(1)),
    "data.slot": Field(32, "pydoc_facts: tokens a group is planted within", at_least(28)),
    "data.train_documents": Field(3000, "pydoc_facts: documents at full length", positive),
    "data.validation_documents": Field(256, "pydoc_facts: held-out documents", positive),
    "data.curriculum_lengths": Field((), "shorter stages first: tokens", each(positive), items=int),
    "data.curriculum_groups": Field((), "their groups of facts", each(positive), items=int),
    "data.curriculum_batches": Field((), "their batch sizes", each(positive), items=int),
    "data.curriculum_steps": Field((), "their steps", each(positive), items=int),
}

DATA_FIELDS = FACTS_FIELDS | {
    "data.name": Field("text_lines", "data set", choices=("text_lines", "pydoc_facts")),
    "data.seed": Field(0, "seed of made documents", non_negative),
    "data.length": Field(4096, "tokens a sequence", at_least(32)),
    # text_lines
    "data.files": Field((), "text_lines: files or globs to train on", items=str),
    "data.validation_files": Field((), "text_lines: files or globs to evaluate on", items=str),
    "data.field": Field(None, "text_lines: field of jsonl rows that holds the text", kind=str),
    "data.tokenizer": Field(
        None, "text_lines: tokenizer.json; None: a BPE trained on the files", kind=str
    ),
    "data.objective": Field(
        "cluster_permuted",
        "text_lines: which tokens are masked, and in what order the text comes",
        choices=("plain", "clustered", "permuted", "cluster_permuted"),
    ),
    "data.num_masked": Field(320, "text_lines: tokens predicted a sequence", positive),
}

FIELDS = COMMON | MODEL_FIELDS | VCC_FIELDS | DATA_FIELDS

_ADAMW = {
    "method": "vcc",
    "optimizer.schedule": "linear",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
}

_QUICKSTART = _ADAMW | {
    "total_steps": 280,
    "batch_size": 4,
    "eval_every": 40,
    "checkpoint_every": 140,
    "log_every": 10,
    "optimizer.learning_rate": 4e-3,
    "optimizer.warmup_steps": 20,
    "optimizer.end_ratio": 0.1,
    "model.vocab_size": 2000,
    "model.d_model": 64,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.d_ff": 128,
    "model.max_positions": 32,
    "model.num_token_types": 1,
    "model.dropout_rate": 0.0,
    "model.attention_dropout_rate": 0.0,
    "model.num_local_layers": 1,
    "model.segment_length": 32,
    "model.num_vip": 32,
    "model.num_fine_blocks": 16,
    "model.positions": "segment",
    "model.init": "copying",
    "data.name": "pydoc_facts",
    "data.questions": 4,
    "data.train_documents": 1000,
    "data.validation_documents": 32,
    "data.curriculum_lengths": (64, 512),
    "data.curriculum_groups": (1, 4),
    "data.curriculum_batches": (64, 16),
    "data.curriculum_steps": (110, 110),
}

_BASE_4K = _ADAMW | {
    "total_steps": 300_000,
    "batch_size": 128,
    "eval_every": 5000,
    "checkpoint_every": 5000,
    "log_every": 100,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 5000,
}

_LARGE = {
    "model.d_model": 1024,
    "model.num_layers": 24,
    "model.num_heads": 16,
    "model.d_ff": 4096,
    "model.num_local_layers": 6,
}

PRESETS = {
    "quickstart": _QUICKSTART,
    "quickstart_dense": _QUICKSTART | {"model.encoder": "dense"},
    "roberta_base_4k": _BASE_4K,
    "roberta_large_4k": _BASE_4K
    | _LARGE
    | {"total_steps": 250_000, "batch_size": 512, "model.num_fine_blocks": 50},
    "roberta_base_512": _ADAMW
    | {
        "total_steps": 750_000,
        "batch_size": 8192,
        "eval_every": 5000,
        "checkpoint_every": 5000,
        "log_every": 100,
        "optimizer.learning_rate": 6e-4,
        "optimizer.warmup_steps": 24_000,
        "optimizer.clip_norm": 0.0,
        "model.norm_order": "post",
        "model.encoder": "dense",
        "model.num_local_layers": 0,
        "model.max_positions": 512,
        "model.num_token_types": 1,
        "data.length": 512,
        "data.objective": "plain",
        "data.num_masked": 77,
    },
    "roberta_base_4k_dense": _BASE_4K
    | {
        "batch_size": 64,
        "model.encoder": "dense",
        "model.num_local_layers": 0,
        "model.num_token_types": 1,
        "data.objective": "plain",
        "data.num_masked": 616,
    },
}


def get_config(preset: str = "quickstart") -> ConfigDict:
    """Returns the config of a preset; `--print_config` explains every field."""
    return fields.preset(FIELDS, PRESETS, preset)
