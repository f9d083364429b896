"""Parity of VCC's pre-training data and of its attention baselines (kinds data_*, baseline_*)."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from jaxmodels.vcc.baseline_attentions import build_attention, import_attention
from jaxmodels.vcc.permuted_mlm import (
    MaskedLM,
    assemble_segments,
    choose_tokens,
    cluster_weights,
    corrupt_tokens,
)
from jaxmodels.vcc.span_corruption import (
    SpanCorruption,
    corrupt_spans,
    sentinel_ids,
    span_lengths,
)

from .fixtures import Case

Computed = dict[str, Any]


def _outputs(values: dict[str, Any]) -> Computed:
    return {f"outputs/{name}": value for name, value in values.items()}


def _vip_threshold(given: Any, size: int) -> int:
    """A number, or a sentence holding `len-60`: the size of the tokenizer less sixty."""
    if isinstance(given, str):
        return size - int(re.search(r"len\s*-\s*(\d+)", given).group(1))
    return size - 5000 if given is None else int(given)


def span_corruption(case: Case) -> Computed:
    """Kind data_span_corruption."""
    config = case.meta["config"]
    size = config["tokenizer_len"]
    settings = SpanCorruption(
        vocab_size=size,
        inputs_length=config["input_length"],
        noise_density=config["noise_density"],
        mean_span_length=config["mean_noise_span_length"],
        vip_threshold=_vip_threshold(config.get("vip_id_threshold"), size),
        eos_id=config["eos"],
        pad_id=config["pad"],
        decoder_start_id=config.get("decoder_start", config["pad"]),
    )
    mask = case.inputs["noise_mask"]
    found = corrupt_spans(case.inputs["token_ids"], mask, settings)
    found["important_mask"] = found.pop("importance_mask")
    found["input_sentinels"] = sentinel_ids(mask, size)
    found["label_sentinels"] = sentinel_ids(1 - mask, size)
    rows = []
    for wanted in case.expected.get("outputs/length_table", np.zeros((0, 3))):
        length, density, mean_span = int(wanted[0]), round(float(wanted[1]), 6), float(wanted[2])
        sizes = span_lengths(length, density, round(mean_span, 6))
        rows.append([length, density, mean_span, *dataclasses.astuple(sizes)])
    found["length_table"] = np.asarray(rows, np.float32)
    return _outputs(found)


def cluster_permuted_mlm(case: Case) -> Computed:
    """Kind data_cluster_permuted_mlm: one assembled sequence, any number of choices of tokens."""
    config, given = case.meta["config"], case.inputs
    settings = MaskedLM(
        vocab_size=config["vocab"],
        max_length=config["max_sequence_length"],
        num_masked=config["num_masked_tokens"],
        segments=(1, 1),
        **{f"{name}_id": config[name] for name in ("cls", "sep", "pad", "mask", "unk")},
    )
    edges = np.cumsum(given["segment_lengths"])
    weights = cluster_weights(edges[-1], given["cluster_centers"], float(given["sigma"]))
    parts = assemble_segments(
        np.split(given["segments_flat"], edges[:-1]),
        np.split(weights, edges[:-1]),
        np.argsort(given["permutation_noise"], kind="stable"),
        settings,
    )
    special = parts["special_tokens_mask"]
    rows = []
    for row, uniform in enumerate(given["gumbel_uniform"]):
        chosen = choose_tokens(parts["masking_probs"], special, uniform, settings.num_masked)
        uniforms = (given["uniform_80"][row], given["uniform_50"][row])
        words = given["random_words"][row]
        rows.append(
            corrupt_tokens(parts["sequence"], chosen, special, uniforms, words, settings.mask_id)
        )
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return _outputs({**parts, **stacked, "masking_probs_before_permutation": weights})


def baseline_attentions(case: Case) -> Computed:
    """Kind baseline_attentions: only rows of real tokens are defined."""
    config = case.meta["config"]
    states, mask = case.inputs["hidden_states"], case.inputs["mask"]
    computed = {}
    for name, options in config["list"]:
        prefix = name.removesuffix("_prenorm") + "."
        state = {k.removeprefix(prefix): v for k, v in case.params.items() if k.startswith(prefix)}
        module = build_attention(name, config["heads"], config["n"], options)
        found = jax.jit(module.apply)({"params": import_attention(state)}, states, mask)
        reference = case.expected.get(f"outputs/{name}", found)
        computed[name] = np.where(mask[..., None] > 0, found, reference)
    return _outputs(computed)
