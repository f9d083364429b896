"""VCC: python -m train.main --config=configs/vcc.py:quickstart --workdir=/tmp/vcc

Presets (section 7 of the paper's own configurations):
  quickstart           VCC answers questions about 4,096-token documents (pydoc_facts).
  quickstart_dense     its dense twin: each VCC layer replaced by full attention.
  roberta_base_4k      VCC-RoBERTa base, cluster-permuted masked LM on your text, 4,096 tokens.
  roberta_large_4k     the same, large.
  roberta_base_512     dense post-norm RoBERTa base, masked LM, 512 tokens.
  roberta_base_4k_dense  dense pre-norm RoBERTa base, masked LM, 4,096 tokens.
  roberta_base_wikihop   VCC-RoBERTa base chooses among WikiHop's candidates, 4,096 tokens.
  roberta_base_quality   the same, among the four options of QuALITY.
  roberta_base_hotpotqa  the same size, HotpotQA: yes, no or a span, with its supporting facts.
The masked-LM presets train on --config.data.files=FILE,... (text; jsonl with --config.data.field),
the three of questions on the published files in --config.data.path=FOLDER.

--config.model.encoder puts another attention into any of them: dense, or a sparse baseline (window,
longt5, longt5_local, bigbird; their sizes are the fields model.sparse.*).
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import fields
from configs.fields import (
    COMMON,
    Check,
    Field,
    FieldError,
    at_least,
    below_one,
    each,
    fraction,
    non_negative,
    one_of,
    positive,
)

KINDS = ("local", "vcc", "dense")
# The settings that each sparse encoder has, among the fields model.sparse.*.
SPARSE = {
    "window": ("window", "num_global", "global_tokens"),
    "longt5": ("radius", "global_block_size"),
    "longt5_local": ("radius",),
    "bigbird": ("block_size", "num_random_blocks"),
}

# How the encoder attends, whatever the trunk.
VCC_FIELDS = {
    "model.encoder": Field(
        "vcc",
        "kind of the layers after the local ones, or a sparse attention in all layers",
        choices=("vcc", "dense", "local", *SPARSE),
    ),
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
    "model.kernels": Field(
        "auto",
        "kernels where they run (auto), or fail (pallas), or plain JAX (xla)",
        choices=("auto", "pallas", "xla"),
    ),
    "model.open_share": Field(
        1.0,
        "below 1: open blocks, at most k, until they have this share of the VIPs' attention",
        Check("above 0, at most 1", lambda value: 0 < value <= 1),
    ),
    "model.share_selection": Field(1, "VCC layers in a row with one choice of blocks", at_least(1)),
}

SPARSE_FIELDS = {
    "model.sparse.window": Field(512, "window: tokens of it; a half on each side", at_least(2)),
    "model.sparse.num_global": Field(1, "window: tokens that see and are seen", non_negative),
    "model.sparse.global_tokens": Field(
        "first", "window: those are the first tokens, or the VIP tokens", choices=("first", "vip")
    ),
    "model.sparse.radius": Field(127, "longt5, longt5_local: tokens seen on each side", positive),
    "model.sparse.global_block_size": Field(16, "longt5: tokens a summary", positive),
    "model.sparse.block_size": Field(64, "bigbird: tokens a block", positive),
    "model.sparse.num_random_blocks": Field(3, "bigbird: random blocks a row", non_negative),
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
    "data.fact_groups": Field(8, "pydoc_facts: groups of facts", at_least(1)),
    "data.facts_per_group": Field(4, "pydoc_facts: facts of a group", at_least(1)),
    "data.slot": Field(32, "pydoc_facts: tokens a group is planted within", at_least(28)),
    "data.train_documents": Field(3000, "pydoc_facts: documents at full length", positive),
    "data.validation_documents": Field(256, "pydoc_facts: held-out documents", positive),
    "data.curriculum_lengths": Field((), "shorter stages first: tokens", each(positive), items=int),
    "data.curriculum_groups": Field((), "their groups of facts", each(positive), items=int),
    "data.curriculum_batches": Field((), "their batch sizes", each(positive), items=int),
    "data.curriculum_steps": Field((), "their steps", each(positive), items=int),
}

QUESTIONS = ("hotpotqa", "wikihop", "quality_articles")

DATA_FIELDS = FACTS_FIELDS | {
    "data.name": Field("text_lines", "data set", choices=("text_lines", "pydoc_facts", *QUESTIONS)),
    "data.seed": Field(0, "seed of made documents", non_negative),
    "data.length": Field(4096, "tokens a sequence", at_least(32)),
    # text_lines
    "data.files": Field((), "text_lines: files or globs to train on", items=str),
    "data.validation_files": Field((), "text_lines: files or globs to evaluate on", items=str),
    "data.field": Field(None, "text_lines: field of jsonl rows that holds the text", kind=str),
    "data.tokenizer": Field(
        None, "RoBERTa's tokenizer.json; None: a BPE trained on the data set", kind=str
    ),
    "data.objective": Field(
        "cluster_permuted",
        "text_lines: which tokens are masked, and in what order the text comes",
        choices=("plain", "clustered", "permuted", "cluster_permuted"),
    ),
    "data.num_masked": Field(320, "text_lines: tokens predicted a sequence", positive),
    # hotpotqa, wikihop, quality_articles
    "data.path": Field(None, "questions: folder of the published files", kind=str),
    "data.shuffle": Field(True, "questions: paragraphs and candidates in random order"),
    "data.max_choices": Field(128, "wikihop, quality_articles: most candidates", positive),
    "data.part_types": Field(False, "questions: each part of the text has its own token type"),
    "data.mark_context": Field(
        False, "hotpotqa: the marks of paragraphs and sentences are VIP tokens too"
    ),
}

FIELDS = COMMON | MODEL_FIELDS | VCC_FIELDS | SPARSE_FIELDS | DATA_FIELDS

# What a sparse encoder has no use for.
_COMPRESSION = VCC_FIELDS.keys() - {
    *("model.encoder", "model.num_vip", "model.overflow", "model.segment_length"),
    *("model.num_local_layers", "model.layer_kinds"),
}


def check(config: ConfigDict, given: Iterable[str]) -> None:
    """Checks that fields given on a command line mean something to the encoder that was chosen.

    Args:
      config: with the values in place.
      given: names of the fields on the command line.

    Raises:
      FieldError: one of them has no meaning there; says which have.
    """
    encoder, given = config.model.encoder, list(given)
    mine = [f"model.sparse.{name}" for name in SPARSE.get(encoder, ())]
    for name in given:
        foreign = name.startswith("model.sparse.") and name not in mine
        if foreign or (encoder in SPARSE and name in _COMPRESSION):
            takes = f"takes {', '.join(mine)}" if mine else "has no sparse attention"
            owners = [f"model.encoder={e}" for e, sizes in SPARSE.items() if name[13:] in sizes]
            wanted = " or ".join(owners) if foreign else "model.encoder=vcc"
            raise FieldError(
                f"{name} says nothing to model.encoder={encoder}, which {takes}; it belongs to "
                f"{wanted}"
            )


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

_QUESTIONS = _ADAMW | {
    "seed": 1234,
    "total_steps": 10 * 1367,
    "batch_size": 32,
    "eval_every": 1367,
    "checkpoint_every": 1367,
    "log_every": 50,
    "optimizer.learning_rate": 5e-5,
    "optimizer.warmup_steps": 1000,
    "model.vocab_size": 50_269,
    "model.num_vip": 256,
    "model.num_fine_blocks": 80,
    "model.overflow": "demote",
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
    # A 4,096-token text is cut; marks of a text's parts are rows behind RoBERTa's own.
    "roberta_base_wikihop": _QUESTIONS | {"data.name": "wikihop"},
    "roberta_base_quality": _QUESTIONS
    | {
        "total_steps": 20 * 79,
        "eval_every": 79,
        "checkpoint_every": 79,
        "optimizer.warmup_steps": 200,
        "model.num_vip": 240,
        "model.num_fine_blocks": 90,
        "data.name": "quality_articles",
        "data.max_choices": 4,
    },
    "roberta_base_hotpotqa": _QUESTIONS
    | {
        "total_steps": 10 * 2827,
        "eval_every": 2827,
        "checkpoint_every": 2827,
        "model.vocab_size": 50_271,
        "model.num_vip": 96,
        "model.num_fine_blocks": 70,
        "data.name": "hotpotqa",
    },
}


def get_config(preset: str = "quickstart") -> ConfigDict:
    """Returns the config of a preset; `--print_config` explains every field."""
    return fields.preset(FIELDS, PRESETS, preset)
