"""From the configuration of a run to the sizes of its model."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.trunks import bert, t5
from jaxmodels.vcc.baseline_attentions import (
    PATTERNS,
    SparsePattern,
    SparseRoberta,
    SparseT5,
    sparse_pattern,
)
from jaxmodels.vcc.config import VccConfig
from jaxmodels.vcc.model import VccRoberta
from jaxmodels.vcc.t5_model import VccT5

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def trunk_config(model: Any) -> bert.BertConfig:
    """Returns the trunk's sizes from `config.model`.

    Raises:
      ValueError: sizes that do not fit together.
    """
    same = (
        "vocab_size",
        "d_model",
        "num_layers",
        "num_heads",
        "d_ff",
        "max_positions",
        "num_token_types",
        "norm_order",
        "norm_eps",
        "dropout_rate",
        "attention_dropout_rate",
        "remat",
    )
    return bert.BertConfig(
        **{name: model[name] for name in same},
        implementation=None if model.attention == "auto" else model.attention,
        dtype=DTYPES[model.dtype],
    )


def t5_config(model: Any) -> t5.T5Config:
    """Returns the sizes of a T5 from `config.model`.

    Raises:
      ValueError: sizes that cannot be.
    """
    same = (
        "vocab_size",
        "d_model",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "head_dim",
        "d_ff",
        "activation",
        "gated",
        "tied_head",
        "num_buckets",
        "max_distance",
        "dropout_rate",
        "start_id",
        "remat",
    )
    return t5.T5Config(
        **{name: model[name] for name in same},
        scaled_output=model.tied_head,
        implementation=None if model.attention == "auto" else model.attention,
        dtype=DTYPES[model.dtype],
    )


def vcc_config(model: Any) -> VccConfig:
    """Returns how to compress from `config.model`.

    Raises:
      ValueError: settings that do not fit together.
    """
    kinds = tuple(model.layer_kinds)
    if not kinds:
        local = model.num_local_layers
        if local > model.num_layers:
            raise ValueError(
                f"model.num_local_layers={local} exceeds model.num_layers={model.num_layers}."
            )
        kinds = ("local",) * local + (model.encoder,) * (model.num_layers - local)
    if len(kinds) != model.num_layers:
        raise ValueError(
            f"model.layer_kinds names {len(kinds)} layers, model.num_layers is "
            f"{model.num_layers}; make them equal or leave layer_kinds empty."
        )
    same = (
        "num_vip",
        "block_size",
        "num_fine_blocks",
        "segment_length",
        "selector",
        "explore_prob",
        "scale_correction",
        "exact_counts",
        "vote_average",
        "layout",
        "overflow",
        "kernels",
        "open_share",
        "share_selection",
        "cross_attention",  # of models with a decoder
    )
    return VccConfig(kinds=kinds, **{name: model[name] for name in same if name in model})


def encoder_config(model: Any) -> VccConfig | SparsePattern:
    """Returns how the encoder attends, by `config.model.encoder`: one flag for all comparisons.

    Raises:
      ValueError: settings that do not fit together, or that this encoder does not have.
    """
    if model.encoder not in PATTERNS:
        return vcc_config(model)
    if model.layer_kinds:
        raise ValueError(
            f"model.layer_kinds={tuple(model.layer_kinds)} arranges local, vcc and dense layers; "
            f"with model.encoder={model.encoder} every layer has that attention: leave it empty."
        )
    names = vars(PATTERNS[model.encoder]).keys()
    sizes = {name: model.sparse[name] for name in names if name in model.sparse}
    if model.encoder == "longt5_local":
        sizes.pop("global_block_size")  # which is what makes it local
    try:
        return sparse_pattern(model.encoder, **sizes)
    except ValueError as error:
        raise ValueError(f"model.sparse: {error}") from error


def num_slots(encoder: VccConfig | SparsePattern) -> int | None:
    """Returns the VIP slots of an encoder; None where no layer compresses."""
    compresses = isinstance(encoder, VccConfig) and "vcc" in encoder.kinds
    return encoder.num_vip if compresses else None


def kinds(model: Any) -> tuple[str, ...]:
    """Returns the kind of every layer, with sparse attention told as local or dense."""
    if model.encoder not in PATTERNS:
        return vcc_config(model).kinds
    local = min(model.num_local_layers, model.num_layers)
    return ("local",) * local + ("dense",) * (model.num_layers - local)


def make_trunk(
    trunk: bert.BertConfig, encoder: VccConfig | SparsePattern
) -> VccRoberta | SparseRoberta | bert.BertModel:
    """Returns RoBERTa: with a sparse encoder, plain where every layer is dense, else VCC-RoBERTa.

    All have one tree of parameters (patterns that summarise add to it).
    """
    if isinstance(encoder, SparsePattern):
        return SparseRoberta(trunk, encoder)
    if set(encoder.kinds) == {"dense"}:
        return bert.BertModel(trunk)
    return VccRoberta(trunk, encoder)


def make_t5(trunk: t5.T5Config, encoder: VccConfig | SparsePattern) -> VccT5 | SparseT5 | t5.T5:
    """Returns T5: with a sparse encoder, plain where every encoder layer is dense, else VCC-T5.

    All have one tree of parameters (patterns that summarise add to it).
    """
    if isinstance(encoder, SparsePattern):
        return SparseT5(trunk, encoder)
    return t5.T5(trunk) if set(encoder.kinds) == {"dense"} else VccT5(trunk, encoder)


def vips(module: VccT5 | SparseT5 | t5.T5, batch: Any) -> dict[str, jax.Array]:
    """Returns the VIP mask of a batch as keywords for the methods of `module`, if it has any."""
    return {"vip_mask": batch["vip_mask"]} if isinstance(module, VccT5 | SparseT5) else {}


Trunk = VccRoberta | SparseRoberta | bert.BertModel


def init(module: Trunk | VccT5 | SparseT5 | t5.T5, rng: jax.Array) -> Any:
    """Returns fresh boxed parameters of a trunk; they do not depend on the input's length."""
    ids = jnp.zeros((1, 2), jnp.int32)
    if isinstance(module, t5.T5):
        return module.init(rng, ids, **vips(module, {"vip_mask": ids}))["params"]
    if isinstance(module, bert.BertModel):
        return module.init(rng, ids)["params"]
    return module.init(rng, ids, ids + 1, ids)["params"]


def encode(module: Trunk, params: Any, batch: Any, rng: Any = None) -> tuple[Any, Any]:
    """Runs a trunk on a batch.

    Args:
      module: from `make_trunk`.
      params: its parameters.
      batch: `input_ids`, `attention_mask`, `vip_mask` [B, n], optionally `token_type_ids` and
        `position_ids`.
      rng: for dropout and exploration; None runs deterministically.

    Returns:
      hidden states [B, n, d_model] float32, and what VCC layers opened (empty if there are none).
    """
    types, positions = batch.get("token_type_ids"), batch.get("position_ids")
    args = (batch["input_ids"], batch["attention_mask"])
    rngs = None if rng is None else {"dropout": rng}
    if isinstance(module, bert.BertModel):
        hidden = module.apply({"params": params}, *args, types, positions, rng is None, rngs=rngs)
        return hidden, {}
    return module.apply(
        {"params": params}, *args, batch["vip_mask"], types, positions, rng is None, rngs=rngs
    )
