"""VCC-T5: python -m train.main --config=configs/vcc_t5.py:quickstart --workdir=/tmp/vcc_t5

Presets (section 7 of the paper's own configurations; SIZE is base, large or 3b):
  quickstart           a small VCC-T5 finds the one fact in 512 tokens of text and writes its value
                       (minutes on a CPU; telling several facts apart takes far longer).
  t5_SIZE_pretrain     span corruption at 4,096 tokens: --config.data.files or --config.data.tfds.
  t5_SIZE_DATA         fine-tuning; SCROLLS' small sets at batch 32, 3e-4, 20 epochs of their grid.
Start from public weights with --config.init_from=FOLDER, name T5's tokenizer.json with
--config.data.tokenizer=FILE and a data set's own files with --config.data.path=FOLDER.
--config.model.encoder=dense, window (LED), longt5, longt5_local or bigbird puts another attention
into the encoder of any of them; sizes are the fields model.sparse.*.

All of them:
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import fields
from configs import vcc as encoder_configs
from configs.fields import COMMON, Field, at_least, below_one, non_negative, positive

DATASETS = (
    *("hotpotqa", "wikihop", "quality", "qasper", "narrative_qa", "contract_nli", "qmsum"),
    *("gov_report", "summ_screen_fd", "cnn_dailymail", "media_sum", "multi_news", "arxiv"),
    *("pubmed", "big_patent"),
)

MODEL_FIELDS = {
    "model.family": Field("t5", "trunk", choices=("t5",)),
    "model.vocab_size": Field(32128, "rows of the word table", positive),
    "model.d_model": Field(768, "width of the residual stream", positive),
    "model.num_layers": Field(12, "encoder layers", positive),
    "model.num_decoder_layers": Field(12, "decoder layers", positive),
    "model.num_heads": Field(12, "attention heads", positive),
    "model.head_dim": Field(64, "width of a head", positive),
    "model.d_ff": Field(3072, "inner width of the feed-forward", positive),
    "model.activation": Field(
        "relu", "of the feed-forward: relu (v1.0) or gelu_new (v1.1)", choices=("relu", "gelu_new")
    ),
    "model.gated": Field(False, "feed-forward with two inner projections (v1.1)"),
    "model.tied_head": Field(True, "the word table is the head (v1.0)"),
    "model.num_buckets": Field(32, "buckets of relative distances", at_least(4)),
    "model.max_distance": Field(128, "from which on distances share a bucket", positive),
    "model.dropout_rate": Field(0.1, "dropout, everywhere T5 has it", below_one),
    "model.start_id": Field(0, "first token of the decoder", non_negative),
    "model.remat": Field(
        "none",
        "what the backward pass recomputes",
        choices=("none", "full", "dots", "dots_no_batch"),
    ),
    "model.attention": Field(
        "auto", "attention implementation", choices=("auto", "xla", "chunked", "cudnn")
    ),
    "model.dtype": Field("float32", "of matrix products", choices=("float32", "bfloat16")),
}

DATA_FIELDS = encoder_configs.FACTS_FIELDS | {
    "data.name": Field(
        "hotpotqa", "data set", choices=("pydoc_facts", "span_corruption", *DATASETS)
    ),
    "data.seed": Field(0, "seed of made documents", non_negative),
    "data.length": Field(4096, "n, tokens of query and context", at_least(32)),
    "data.target_length": Field(40, "tokens of an answer, its end included", at_least(2)),
    "data.tokenizer": Field(
        None, "T5's tokenizer.json; None: one trained on the data set", kind=str
    ),
    # the paper's data sets
    "data.path": Field(None, "folder of the published files; None: TFDS's copy", kind=str),
    "data.tfds_dir": Field(None, "folder of TFDS; None: its default", kind=str),
    "data.exact_vip": Field(
        False, "mark the query alone (the official code: one token of the context too)"
    ),
    "data.long_query": Field(
        "error", "a query that is longer than the input", choices=("error", "warn")
    ),
    "data.shuffle": Field(True, "paragraphs and candidates in random order (HotpotQA, WikiHop)"),
    "data.references": Field(
        "single",
        "an answer is judged by its record's own reference, or by all of the same question",
        choices=("single", "all"),
    ),
    # span_corruption
    "data.files": Field((), "span_corruption: files or globs to train on", items=str),
    "data.validation_files": Field((), "span_corruption: files or globs to evaluate on", items=str),
    "data.field": Field(None, "span_corruption: field of jsonl rows with the text", kind=str),
    "data.tfds": Field(None, "span_corruption: TFDS data set with a field text", kind=str),
    "data.tfds_splits": Field(
        ("train[1%:]", "train[:1%]"), "span_corruption: its splits to train and evaluate on"
    ),
    "data.noise_density": Field(0.148, "span_corruption: share of the text replaced", below_one),
    "data.mean_span_length": Field(3.0, "span_corruption: tokens a span", at_least(1)),
}

DECODE_FIELDS = {
    "decode.num_beams": Field(1, "hypotheses of beam search; 1: greedy", positive),
    "decode.length_penalty": Field(1.0, "exponent of a hypothesis' length in its score"),
    "decode.in_evaluation": Field(True, "evaluations generate answers (exact_match)"),
}

# LED's window, which is twice Longformer's.
SPARSE_FIELDS = encoder_configs.SPARSE_FIELDS | {
    "model.sparse.window": dataclasses.replace(
        encoder_configs.SPARSE_FIELDS["model.sparse.window"], default=1024
    )
}

CROSS_FIELDS = {
    "model.cross_attention": Field(
        "tokens",
        "the decoder attends to all tokens, or to the rows of the last VCC layer",
        choices=("tokens", "rows"),
    ),
}

FIELDS = (
    COMMON
    | MODEL_FIELDS
    | encoder_configs.VCC_FIELDS
    | CROSS_FIELDS
    | SPARSE_FIELDS
    | DATA_FIELDS
    | DECODE_FIELDS
)

check = encoder_configs.check  # fields that say nothing to the encoder

_ADAMW = {
    "method": "vcc",
    "optimizer.schedule": "linear",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
}

_SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"model.d_model": 1024, "model.d_ff": 4096, "model.num_heads": 16},
    "3b": {
        "model.d_model": 1024,
        "model.d_ff": 16384,
        "model.num_heads": 32,
        "model.head_dim": 128,
        "model.remat": "full",
    },
}
for _size in ("large", "3b"):
    _SIZES[_size] |= {
        "model.num_layers": 24,
        "model.num_decoder_layers": 24,
        "model.num_local_layers": 6,
    }

_PRETRAIN = _ADAMW | {
    "seed": 111_111,
    "total_steps": 250_000,
    "batch_size": 256,
    "eval_every": 5000,
    "checkpoint_every": 5000,
    "log_every": 100,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 5000,
    "model.vocab_size": 38_000,
    "model.num_vip": 224,
    "model.num_fine_blocks": 90,
    "model.dtype": "bfloat16",
    "data.name": "span_corruption",
    "data.target_length": 898,
    "decode.in_evaluation": False,
}

# data: n, decoder length, p, k, epochs, warm-up, training examples (whose number gives the steps)
_TUNING = {
    "hotpotqa": (4096, 40, 96, 70, 10, 1000, 90_447),
    "wikihop": (4096, 32, 288, 80, 10, 1000, 43_738),
    "cnn_dailymail": (4096, 256, 16, 90, 10, 1000, 287_113),
    "media_sum": (4096, 256, 16, 90, 10, 1000, 443_596),
    "multi_news": (8192, 512, 16, 90, 20, 1000, 44_972),
    "arxiv": (16384, 512, 16, 90, 10, 1000, 203_037),
    "gov_report": (16384, 512, 16, 90, 20, 1000, 17_457),
    "summ_screen_fd": (16384, 512, 16, 90, 20, 200, 3_673),
    "qmsum": (16384, 310, 48, 90, 20, 100, 1_257),
    "qasper": (16384, 128, 32, 90, 20, 200, 2_567),
    "quality": (16384, 90, 240, 90, 20, 200, 2_523),
    "contract_nli": (16384, 4, 48, 90, 20, 1000, 7_191),
    "narrative_qa": (16384, 47, 48, 90, 5, 1000, 55_003),
}

# NarrativeQA beyond 16K: n, p, b, k
_LONG = {
    "32k": (32_768, 48, 16, 90),
    "32k_b32": (32_768, 64, 32, 55),
    "32k_b32_k45": (32_768, 64, 32, 45),
    "64k": (65_536, 48, 16, 90),
    "64k_b64": (65_536, 64, 64, 30),
    "128k": (131_072, 48, 16, 90),
}


def _tuning(size: str, data: str) -> dict[str, Any]:
    length, target, slots, fine, epochs, warmup, examples = _TUNING[data]
    steps = epochs * -(-examples // 32)
    # As in the paper: the sets with long answers, and the large model on all but short inputs.
    again = data in ("gov_report", "summ_screen_fd") or (size == "large" and length > 4096)
    return _ADAMW | {
        "seed": 1234,
        "total_steps": steps,
        "batch_size": 32,
        "eval_every": max(100, steps // 10),
        "checkpoint_every": max(100, steps // 10),
        "log_every": 50,
        "optimizer.learning_rate": 3e-4,
        "optimizer.warmup_steps": warmup,
        "model.num_vip": slots,
        "model.num_fine_blocks": fine,
        "model.dtype": "bfloat16",
        "model.remat": "full" if again else "none",
        "data.name": data,
        "data.length": length,
        "data.target_length": target,
    }


def _of_size(size: str) -> dict[str, dict[str, Any]]:
    """Every preset of a size."""
    name, sizes = f"t5_{size}", _SIZES[size]
    rate = {"optimizer.learning_rate": 5e-4} if size == "3b" else {}
    found = {f"{name}_pretrain": _PRETRAIN | sizes | rate}
    found |= {f"{name}_{data}": _tuning(size, data) | sizes for data in _TUNING}
    for long, (length, slots, block, fine) in _LONG.items():
        found[f"{name}_narrative_qa_{long}"] = found[f"{name}_narrative_qa"] | {
            "data.length": length,
            "model.num_vip": slots,
            "model.block_size": block,
            "model.num_fine_blocks": fine,
            "model.remat": "full",
        }
    return found


_QUICKSTART = _ADAMW | {
    "total_steps": 300,
    "batch_size": 8,
    "eval_every": 100,
    "checkpoint_every": 150,
    "log_every": 10,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 20,
    "optimizer.end_ratio": 0.1,
    "model.vocab_size": 2000,
    "model.d_model": 64,
    "model.num_layers": 3,
    "model.num_decoder_layers": 1,
    "model.num_heads": 4,
    "model.head_dim": 16,
    "model.d_ff": 128,
    "model.dropout_rate": 0.0,
    "model.num_local_layers": 1,
    "model.segment_length": 32,
    "model.num_vip": 16,
    "model.num_fine_blocks": 8,
    "data.name": "pydoc_facts",
    "data.length": 512,
    "data.target_length": 2,
    "data.questions": 1,
    "data.fact_groups": 1,
    "data.facts_per_group": 1,
    "data.train_documents": 2000,
    "data.validation_documents": 64,
    "data.curriculum_lengths": (64,),
    "data.curriculum_groups": (1,),
    "data.curriculum_batches": (64,),
    "data.curriculum_steps": (150,),
}

PRESETS = {"quickstart": _QUICKSTART}
for _size in _SIZES:
    PRESETS |= _of_size(_size)

__doc__ += "".join(f"  {name} \n" for name in PRESETS)


def get_config(preset: str = "quickstart") -> ConfigDict:
    """Returns the config of a preset; `--print_config` explains every field."""
    return fields.preset(FIELDS, PRESETS, preset)
