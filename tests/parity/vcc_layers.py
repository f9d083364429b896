"""Parity of VCC's compression and layers, every intermediate (kinds compress, roberta_layers)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.core.blocks import stacked_init
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.trunks.bert import BertConfig, run_dense_layers
from jaxmodels.vcc import compression
from jaxmodels.vcc.config import LAYOUTS, VccConfig
from jaxmodels.vcc.layer import RelativePositions, VccLayer, enter_rows, run_vcc_layer

from .fixtures import Case

Computed = dict[str, Any]
# The official stack of layers has keys `layer.0. ...`; the encoder that holds it is not there.
RULES = weights.vcc_rules(prefix="", trunk="")


def bert_config(config: dict[str, Any], num_layers: int) -> BertConfig:
    """Our sizes from the official configuration of a layer."""
    return BertConfig(
        d_model=config["hidden_size"],
        num_layers=num_layers,
        num_heads=config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        norm_order="pre",
        norm_eps=config["layer_norm_eps"],
    )


def vcc_config(config: dict[str, Any], kinds: tuple[str, ...], layout: str) -> VccConfig:
    """Our compression settings from the official configuration."""
    selectors = {"attention_based_selector": "attention", "random_selector": "random"}
    return VccConfig(
        kinds=kinds,
        num_vip=config["num_important_tokens"],
        block_size=config["block_size"],
        num_fine_blocks=config["num_fine_blocks"],
        segment_length=config.get("short_segment_size", 512),
        selector=selectors[config["selector_type"]],
        explore_prob=config["explore_prob"],
        scale_correction=config["scale_correction"],
        layout=layout,
        overflow="demote",
    )


def compress(case: Case) -> Computed:
    """Kind compress: block means, differences, their VJP, and reading back after an update."""
    given, size = case.inputs, case.meta["config"]["block_size"]
    batch, length, width = given["fine_states"].shape
    mask = given["mask" if "mask" in given else "fine_mask"].reshape(batch, -1, size)
    blocks = given["fine_states"].reshape(batch, -1, size, width)
    found, vjp = jax.vjp(lambda x: compression.compress(x, mask), blocks)
    (gradient,) = vjp((given["cot_coarse"], given["cot_difference"]))
    after = compression.decompress(found[0] + given["coarse_update"], found[1])
    return {
        "outputs/coarse_states": found[0],
        "outputs/coarse_mask": mask.max(-1),
        "outputs/difference": found[1],
        "outputs/decompressed_after_update": after.reshape(batch, length, width),
        "grads/fine_states": gradient.reshape(batch, length, width),
    }


def rows(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rows index[i] of x[i]: [B, m, ...] and [B, k] to [B, k, ...]."""
    return np.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def aligned(ours: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """Indices [B, k] in the reference's order if each row is the same set, else as they are."""
    same = reference is not None and ours.shape == reference.shape
    if same and np.array_equal(np.sort(ours), np.sort(reference)):
        return reference
    return ours


class Bank:
    """The official append-only bank of differences, rebuilt from ours.

    Every layer appends the blocks it has opened; `slot` tells where the newest difference of each
    block lies.
    """

    def __init__(self, difference: np.ndarray) -> None:
        """Starts with the differences [B, m, b, d] of the initial compression."""
        self.blocks = difference
        batch, count = self.blocks.shape[:2]
        self.slot = np.tile(np.arange(count), (batch, 1))

    def append(self, difference: np.ndarray, fine: np.ndarray) -> None:
        """Appends the differences of the blocks `fine` [B, k] after a layer."""
        newest = rows(difference, fine)
        places = self.blocks.shape[1] + np.arange(fine.shape[1])
        self.slot = self.slot.copy()
        np.put_along_axis(self.slot, fine, np.tile(places, (len(fine), 1)), axis=1)
        self.blocks = np.concatenate([self.blocks, newest], axis=1)


def entry_outputs(x: np.ndarray, state: compression.State, layout: compression.Layout) -> Computed:
    """What holds before the first layer."""
    batch, _, width = x.shape
    masked = rows(x, layout.order)[:, state.vip.shape[1] :]
    fine_mask = layout.mask.reshape(batch, -1)
    return {
        "outputs/sorted_order": layout.order,
        "outputs/vip_states": state.vip,
        "outputs/vip_mask": layout.vip_mask.astype(np.int32),
        "outputs/vip_importance": layout.importance.astype(np.int32),
        "outputs/fine_states0": masked * fine_mask[..., None],
        "outputs/fine_mask": fine_mask.astype(np.int32),
    }


def layer_outputs(
    case: Case,
    name: str,
    layout: compression.Layout,
    states: tuple[compression.State, compression.State],
    chosen: compression.Selection,
    opened: np.ndarray,
) -> tuple[Computed, np.ndarray]:
    """All intermediates of one layer, block rows in the reference's order; and that order.

    `opened` [B, k, b, d] are the tokens of the opened blocks after the layer, in our order.
    """
    before, after = states
    fine = aligned(chosen.fine, case.expected.get(f"{name}/fine_block_indices"))
    rest = aligned(chosen.rest, case.expected.get(f"{name}/coarse_block_indices"))
    batch, width = len(fine), before.coarse.shape[-1]
    by_block = np.zeros_like(before.difference)
    np.put_along_axis(by_block, chosen.fine[..., None, None], opened, axis=1)

    def tokens(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, -1, width)

    values = {
        "coarse_states": before.coarse,
        "coarse_mask": layout.block_mask,
        "selector_probs": chosen.weights,
        "selector_logits": chosen.scores,
        "fine_block_indices": fine,
        "coarse_block_indices": rest,
        "partial_fine_states": tokens(
            rows(before.coarse, fine)[:, :, None] - rows(before.difference, fine)
        ),
        "partial_fine_mask": rows(layout.mask, fine).reshape(batch, -1),
        "partial_coarse_states": rows(before.coarse, rest),
        "partial_coarse_mask": rows(layout.block_mask, rest),
        "vip_states_out": after.vip,
        "partial_fine_states_out": tokens(rows(by_block, fine)),
        "partial_coarse_states_out": rows(after.coarse, rest),
    }
    values["partial_fine_mask"] = values["partial_fine_mask"].astype(np.int32)
    if layout.positions is not None:
        places = layout.positions
        values["coarse_positions"], values["vip_positions"] = places.coarse, places.vip
        values["partial_fine_positions"] = rows(places.fine, fine).reshape(batch, -1)
        values["partial_coarse_positions"] = rows(places.coarse, rest)
    return {f"{name}/{key}": value for key, value in values.items()}, fine


def roberta_layers(case: Case) -> list[Computed]:
    """Kind roberta_layers, in both layouts of the compressed rows."""
    return [_layers_in_layout(case, layout) for layout in LAYOUTS]


def _layers_in_layout(case: Case, layout_name: str) -> Computed:
    config, depth = case.meta["config"], case.meta["layers"]
    sizes = bert_config(config, depth)
    settings = vcc_config(config, ("vcc",) * depth, layout_name)
    layer = sizes.make_layer(VccLayer, vcc=settings)
    template = jax.eval_shape(stacked_init(layer, depth, sizes.d_model), jax.random.key(0))
    template = {"encoder": {"layers": partitioning.unbox(template)}}
    state_dict = {f"encoder.{key}": value for key, value in case.params.items()}
    tree = weights.import_weights(template, state_dict, RULES)["encoder"]
    computed, gradients = layers_traced(case, layer, tree)
    if "outputs/dense_prenorm_hidden_states" in case.expected:
        x, mask = jnp.asarray(case.inputs["hidden_states"]), case.inputs["mask"]
        computed["outputs/dense_prenorm_hidden_states"] = dense(sizes, tree["layers"], x, mask)
    return computed | parameter_gradients({"encoder": gradients}, RULES, strip="encoder.")


def layers_traced(
    case: Case, layer: VccLayer, tree: Any, bias: RelativeBias | None = None
) -> tuple[Computed, Any]:
    """Everything that a file of chained VCC layers holds, and the gradients of `tree`.

    `tree` has `layers` and, with a position bias, `relative_bias`.
    """
    given, settings, depth = case.inputs, layer.vcc, case.meta["layers"]

    def run(tree: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        masks, slots = (given["mask"], given["importance_mask"]), settings.num_vip
        state, layout = compression.enter(
            x, *masks, slots, settings.block_size, given.get("positions")
        )
        relative = None if bias is None else RelativePositions(tree["relative_bias"], bias)
        states, selections, opened = [state], [], []
        for params in unstacked(tree["layers"], depth):
            before = state
            state, chosen = run_vcc_layer(layer, params, before, layout, relative=relative)
            states.append(state)
            selections.append(chosen)
            opened.append(opened_tokens(layer, params, before, layout, chosen, relative))
        hidden = compression.leave(state, layout)
        trace = (hidden, layout, states, selections, opened)
        return jnp.sum(hidden * given["cotangent"]), trace

    x = jnp.asarray(given["hidden_states"])
    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, trace), gradients = step(tree, x)
    # Fetched at once: what follows is indexing in NumPy.
    hidden, layout, states, selections, opened = jax.tree.map(np.asarray, trace)
    computed = entry_outputs(given["hidden_states"], states[0], layout)
    bank = Bank(states[0].difference)
    for index, chosen in enumerate(selections):
        name, pair = f"outputs/layer{index}", (states[index], states[index + 1])
        values, fine = layer_outputs(case, name, layout, pair, chosen, opened[index])
        computed |= values
        computed |= {f"{name}/bank": bank.blocks, f"{name}/bank_slot_of_block": bank.slot}
        bank.append(states[index + 1].difference, fine)
    computed |= {"outputs/hidden_states": hidden, "grads/hidden_states": gradients[1]}
    return computed, gradients[0]


def opened_tokens(
    layer: VccLayer,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    chosen: compression.Selection,
    relative: RelativePositions | None,
) -> jax.Array:
    """Tokens of the opened blocks after a layer, [B, k, b, d], padding rows included."""
    entered = enter_rows(layer.vcc, state, layout, chosen)
    y = layer.apply({"params": params}, entered, relative=relative, method="encode")
    batch, k = chosen.fine.shape
    size, width = state.difference.shape[2:]
    return y[:, : k * size].reshape(batch, k, size, width)


def unstacked(stack: Any, depth: int) -> list[Any]:
    """The parameters of each layer of a stack."""

    def layer(index: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], stack)

    return [layer(index) for index in range(depth)]


def dense(sizes: BertConfig, stack: Any, x: jax.Array, mask: np.ndarray) -> jax.Array:
    """The same layers, uncompressed; the reference entered them with zeros at padding."""
    run = jax.jit(run_dense_layers, static_argnums=0)
    return run(sizes, stack, x * mask[..., None], jnp.asarray(mask))


def parameter_gradients(gradients: Any, rules: weights.Rules, strip: str = "") -> Computed:
    """Gradients under their official names, `strip` cut off the front."""
    exported = weights.export_weights(gradients, rules)
    return {f"grads/params/{key.removeprefix(strip)}": value for key, value in exported.items()}
