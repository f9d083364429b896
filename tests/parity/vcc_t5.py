"""Parity of T5-VCC: position bias, layers, and sequence to sequence (kinds t5_*)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import decoding, weights
from jaxmodels.core import losses
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.trunks import t5
from jaxmodels.vcc import VccT5, compression
from jaxmodels.vcc.config import LAYOUTS
from jaxmodels.vcc.layer import VccLayer
from jaxmodels.weights.t5 import t5_rules
from jaxmodels.weights.tensor_file import as_tensor_file

from .fixtures import Case
from .vcc_layers import layers_traced, parameter_gradients, vcc_config

Computed = dict[str, Any]
GREEDY = "outputs/generated_greedy_max_length"


def t5_config(config: dict[str, Any], num_layers: int) -> t5.T5Config:
    """Our sizes from the official configuration."""
    *gated, activation = config["feed_forward_proj"].split("-")
    tied = config.get("tie_word_embeddings", True)
    return t5.T5Config(
        vocab_size=config["vocab_size"],
        d_model=config["d_model"],
        num_layers=num_layers,
        num_decoder_layers=config["num_decoder_layers"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        d_ff=config["d_ff"],
        activation="gelu_new" if gated and activation == "gelu" else activation,
        gated=bool(gated),
        tied_head=tied,
        scaled_output=tied,
        num_buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
        norm_eps=config["layer_norm_epsilon"],
        start_id=config["decoder_start_token_id"],
    )


def kinds(config: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of the encoder's layers, by their official class."""
    return tuple(
        "vcc" if name.endswith("VccT5Block") else "local" for name in config["encoder_layers"]
    )


def rules_of(sizes: t5.T5Config, decoder: bool) -> weights.Rules:
    """The official table: the position bias stands under every encoder layer."""
    return t5_rules(
        gated=sizes.gated,
        tied_head=sizes.tied_head,
        decoder=decoder,
        repeated_bias=sizes.num_layers,
    )


def t5_relative_bias(case: Case) -> Computed:
    """Kind t5_relative_bias: buckets, bias, gradient of the table, positions of blocks."""
    given, meta = case.inputs, case.meta
    bias = RelativeBias(meta["heads"], meta["num_buckets"], meta["max_distance"])
    query, key = (jnp.asarray(given[f"{side}_positions"]) for side in ("query", "key"))

    def at(table: jax.Array) -> jax.Array:
        return bias.apply({"params": {"embedding": table}}, query, key, method="at")

    (name, table), = case.params.items()  # fmt: skip
    found, pull = jax.vjp(at, jnp.asarray(table))
    relative = key[:, None, :] - query[:, :, None]
    computed = {
        "outputs/bucket": bias.apply({"params": {"embedding": table}}, relative, method="buckets"),
        "outputs/bias": found,
        f"grads/{name}": pull(jnp.asarray(given["cotangent"]))[0],
    }
    for name in case.expected:
        if name.startswith("outputs/coarse_positions_b"):
            size = int(name.removeprefix("outputs/coarse_positions_b"))
            blocks = given["fine_positions"].reshape(len(given["fine_positions"]), -1, size)
            computed[name] = compression.block_positions(jnp.asarray(blocks))
    return computed


def t5_layers(case: Case) -> list[Computed]:
    """Kind t5_layers, in both layouts of the compressed rows."""
    return [_layers_in_layout(case, layout) for layout in LAYOUTS]


def _layers_in_layout(case: Case, layout: str) -> Computed:
    depth, config = case.meta["layers"], case.meta["config"]
    sizes = t5_config(config, depth)
    settings = vcc_config(config, ("vcc",) * depth, layout)
    layer = sizes.make_layer(cls=VccLayer, vcc=settings)
    # The official stack has keys `block.0. ...`, without the encoder around it.
    rules = [
        rule
        for rule in rules_of(sizes, decoder=False)
        if isinstance(rule, weights.Rule) and rule.source.startswith("encoder.block.")
    ]
    tensors = {f"encoder.{key}": value for key, value in case.params.items()}
    tree = weights.import_tree(as_tensor_file(tensors), rules)["encoder"]
    computed, gradients = layers_traced(case, layer, tree, sizes.make_bias())
    return computed | parameter_gradients({"encoder": gradients}, rules, strip="encoder.")


def t5_seq2seq(case: Case) -> list[Computed]:
    """Kind t5_seq2seq, in both layouts of the compressed rows."""
    return [_seq2seq_in_layout(case, layout) for layout in LAYOUTS]


def _seq2seq_in_layout(case: Case, layout: str) -> Computed:
    config, given = case.meta["config"], case.inputs
    arrangement = kinds(config)
    sizes = t5_config(config, len(arrangement))
    model = VccT5(sizes, vcc_config(config, arrangement, layout))
    rules = rules_of(sizes, decoder=True)
    params = weights.import_tree(as_tensor_file(case.params), rules)
    masks = given["attention_mask"], given["encoder_input_important_mask"]
    ids, mask, vip, labels = map(jnp.asarray, (given["input_ids"], *masks, given["labels"]))
    inputs = t5.shift_right(labels, sizes.start_id, config["pad_token_id"])

    def run(params: Any) -> tuple[jax.Array, Any]:
        bound = model.bind({"params": params})
        encoded, opened = bound.encode_traced(ids, mask, vip_mask=vip)
        logits = bound.head(bound.decode(inputs, encoded, mask))
        total, weight = losses.cross_entropy(logits, labels)["loss"]
        return total / weight, (encoded, opened, logits)

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, (encoded, opened, logits)), gradients = step(params)
    computed = {
        "outputs/encoder_last_hidden_state": encoded,
        "outputs/logits": logits,
        "outputs/loss": loss,
    }
    for index, fine in enumerate(opened["fine_blocks"]):
        computed[f"outputs/fine_block_indices_vcc{index}"] = fine
    for name in case.expected:
        if name.startswith(GREEDY):
            found = greedy(case, model, params, int(name.removeprefix(GREEDY)))
            # The reference stops at its longest row: behind it there is padding alone.
            width = case.expected[name].shape[1]
            rest = found[:, width:] == config["pad_token_id"]
            computed[name] = found[:, :width] if rest.all() else found
    return computed | parameter_gradients(jax.device_get(gradients), rules)


def greedy(case: Case, model: VccT5, params: Any, max_length: int) -> np.ndarray:
    """Greedy tokens, the start token first."""
    config, given = case.meta["config"], case.inputs
    settings = decoding.GenerationSettings.from_total_lengths(
        max_length=max_length,
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
    )
    found = decoding.Generator(model, settings)(
        params,
        given["input_ids"],
        given["attention_mask"],
        vip_mask=jnp.asarray(given["encoder_input_important_mask"]),
    )
    return np.asarray(found.sequences)
