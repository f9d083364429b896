"""The VCC transformer layer (section 3.4), for every pre-norm trunk.

A VCC layer has exactly the parameters of the trunk's own layer: any pre-norm checkpoint loads, and
one stack of parameters runs dense, in local segments, or compressed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.core import attention, blocks, partitioning
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.vcc import compression, kernels
from jaxmodels.vcc.config import VccConfig
from jaxmodels.vcc.rows import Rows, gather_rows, scatter_rows
from kernels_pallas import weighted_attention


@struct.dataclass
class RelativePositions:
    """A relative position bias with its table, which all layers of a T5 encoder share.

    Attributes:
      params: of the bias: `{"embedding": [num_buckets, H]}`.
      bias: unbound.
    """

    params: Any
    bias: RelativeBias = struct.field(pytree_node=False)

    def at(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the bias [B, H, Q, K] float32 of positions [B, Q] and [B, K] int."""
        return self.bias.apply({"params": self.params}, query, key, method="at")

    def along(self, length: int) -> jax.Array:
        """Returns the bias [1, H, length, length] float32 of positions 0, 1, 2, ..."""
        return self.bias.apply({"params": self.params}, length, length)

    def of_rows(self, positions: jax.Array) -> weighted_attention.RelativeBias:
        """Returns the bias between all pairs of rows at positions [B, r], as kernels take it."""
        table = self.params["embedding"]
        return weighted_attention.RelativeBias(positions, table, self.bias.max_distance)


class VccLayer(blocks.TransformerLayer):
    """The parts of a VCC layer that have parameters (section 3.4a and d); see `run_vcc_layer`.

    Attributes:
      vcc: how to compress.
    """

    vcc: VccConfig | None = None

    def choose(
        self,
        state: compression.State,
        layout: compression.Layout,
        rng: jax.Array | None = None,
        explore: bool = False,
        relative: RelativePositions | None = None,
    ) -> compression.Selection:
        """Selects the blocks to open with this layer's own norm, queries and keys (3.4a).

        Args:
          state: before the layer.
          layout: of the sequence.
          rng: for exploration and random selection.
          explore: open random blocks in a share `explore_prob` of the examples.
          relative: bias between VIPs and blocks, by their positions.
        """
        vcc = self.vcc
        num_fine = min(vcc.num_fine_blocks, state.coarse.shape[1])
        query = self.attention.queries(self.attention_norm(state.vip))
        key = self.attention.keys(self.attention_norm(state.coarse))
        if attention.platform() == "tpu":  # libtpu 0.0.42 overflows its stack fusing what is before
            query, key = jax.lax.optimization_barrier((query, key))
        bias = attention.key_mask_bias(layout.block_mask)[:, None, None, :]
        if relative is not None:
            bias = bias + relative.at(layout.positions.vip, layout.positions.coarse)
        weights = attention.attention_weights(query, key, bias)
        order, explored, learn = None, None, vcc.straight_through
        if vcc.selector == "random":
            rng = jax.random.key(0) if rng is None else rng
            order, learn = compression.random_order(rng, layout.block_mask), False
        elif explore and vcc.explore_prob > 0:
            coin, noise = jax.random.split(rng)
            explored = jax.random.bernoulli(coin, vcc.explore_prob, weights.shape[:1])
            order = jax.random.uniform(noise, layout.block_mask.shape)
        return compression.select(
            weights,
            layout,
            num_fine,
            order_by=order,
            explored=explored,
            straight_through=learn,
            vote_average=vcc.vote_average,
            open_share=vcc.open_share,
        )

    def encode(
        self,
        rows: Rows,
        deterministic: bool = True,
        relative: RelativePositions | None = None,
    ) -> jax.Array:
        """Runs both branches on the r rows (3.4d): Y = (f + a) * sigma + X, [B, r, d] float32."""
        x = rows.x
        mixed = self.drop(self.attend(rows, deterministic, relative), deterministic)
        out = self.drop(self.ffn(self.ffn_norm(mixed + x)), deterministic)
        return (out + mixed) * rows.gate[..., None] + x

    def attend(
        self,
        rows: Rows,
        deterministic: bool = True,
        relative: RelativePositions | None = None,
    ) -> jax.Array:
        """Returns the attention branch of the r rows, [B, r, d]: all are queries, keys, values."""
        x, own = self.attention_norm(rows.x), self.attention
        drops = self.attention_dropout_rate > 0 and not deterministic
        if kernels.attends(self.vcc.kernels, self.implementation, drops):
            heads = own.queries(x), own.keys(x), own.values(x)
            far = None if relative is None else relative.of_rows(rows.positions)
            return own.project_out(kernels.attend(self.vcc.kernels, heads, rows.bias, far))
        bias = rows.bias[:, None, None, :]
        if relative is not None:
            bias = bias + relative.at(rows.positions, rows.positions)
        return own(x, bias, deterministic=deterministic)


def run_vcc_layer(
    layer: VccLayer,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    rng: jax.Array | None = None,
    policy: str = "none",
    relative: RelativePositions | None = None,
) -> tuple[compression.State, compression.Selection]:
    """Runs one VCC layer: select, refine, encode, write back (section 3.4).

    Args:
      layer: unbound module.
      params: its parameters.
      state: P, C, D.
      layout: of the sequence.
      rng: for dropout and exploration while training; None runs deterministically.
      policy: remat policy of `encode` alone: selection, refine and write-back are linear in the
        bank of differences and save only indices, while recomputing them would save the bank.
      relative: the position bias that all layers share (T5), for a layout with positions.

    Returns:
      the state after the layer, and which blocks it opened.
    """

    def encode(rows: Rows, drop: Any) -> jax.Array:
        return _encode(layer, policy, {"params": params}, rows, drop, relative)

    return _with_open_blocks(layer, params, state, layout, rng, relative, encode)


def run_sharing_layers(
    layer: VccLayer,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    rng: jax.Array | None = None,
    policy: str = "none",
    relative: RelativePositions | None = None,
) -> tuple[compression.State, compression.Selection]:
    """Runs VCC layers on the blocks that the first of them chooses; they stay open in between.

    Args: as `run_vcc_layer`, but `params` are stacked on a leading layer axis.

    Returns:
      the state after the last layer, and which blocks were open.
    """

    def encode(rows: Rows, drop: Any) -> jax.Array:
        def body(one: Any, x: jax.Array, key: Any) -> tuple[jax.Array, None]:
            now = rows.replace(x=x)
            return _encode(layer, policy, {"params": one}, now, key, relative), None

        return blocks.scan_layers(body, params, rows.x, drop)[0]

    first = jax.tree.map(lambda leaf: leaf[0], params)
    return _with_open_blocks(layer, first, state, layout, rng, relative, encode)


def _with_open_blocks(
    layer: VccLayer,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    rng: jax.Array | None,
    relative: RelativePositions | None,
    encode: Callable[[Rows, Any], jax.Array],
) -> tuple[compression.State, compression.Selection]:
    """Selects by a layer's parameters, opens, runs `encode` on the rows and writes back."""
    deterministic = rng is None
    pick, drop = (None, None) if deterministic else jax.random.split(rng)
    given = (state, layout, pick, not deterministic, relative)
    chosen = layer.apply({"params": params}, *given, method="choose")
    run = kernels.blocks(layer.vcc.kernels, *state.difference.shape[2:])
    fine, state = run.open_blocks(state, chosen.fine)
    rows = enter_rows(layer.vcc, state, layout, chosen, fine)
    y = encode(rows.replace(x=partitioning.constrain_batch(rows.x)), drop)
    return scatter_rows(state, layout, chosen, y, run.write_back), chosen


def _encode(
    layer: VccLayer, policy: str, variables: Any, rows: Rows, key: Any, relative: Any
) -> jax.Array:
    """Y of the rows; the backward pass recomputes what the policy drops."""

    def encode(variables: Any, rows: Rows, key: Any, relative: Any) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return layer.apply(variables, rows, key is None, relative, rngs=rngs, method="encode")

    return blocks.remat(encode, policy)(variables, rows, key, relative)


def run_vcc_layers(
    layer: VccLayer,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    rng: jax.Array | None = None,
    policy: str = "none",
    relative: RelativePositions | None = None,
) -> tuple[compression.State, dict[str, jax.Array]]:
    """Runs a stack of VCC layers.

    Args:
      layer: unbound module.
      params: stacked on a leading layer axis.
      state: P, C, D; D is updated in place from layer to layer.
      layout: of the sequence.
      rng: as `run_vcc_layer`, as the others.
      policy: see there.
      relative: see there.

    Returns:
      the state after the last layer; "fine_blocks" [layers, B, k], -1 where a slot was left over,
      and "scores" [layers, B, m].
    """

    share, depth = layer.vcc.share_selection, jax.tree.leaves(params)[0].shape[0]
    run = run_vcc_layer if share == 1 else run_sharing_layers

    def body(some: Any, state: compression.State, key: Any) -> tuple[Any, Any]:
        state, chosen = run(layer, some, state, layout, key, policy, relative)
        fine = chosen.fine
        if layer.vcc.adaptive:
            fine = jnp.where(fine == layout.mask.shape[1] - 1, -1, fine)
        return state, {"fine_blocks": fine, "scores": chosen.scores}

    if share == 1:
        return blocks.scan_layers(body, params, state, rng)
    whole, traces = depth - depth % share, []
    if whole:
        groups = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, share, *leaf.shape[1:]), params)
        state, trace = blocks.scan_layers(body, groups, state, rng)
        traces.append(jax.tree.map(lambda leaf: jnp.repeat(leaf, share, axis=0), trace))
    if whole < depth:
        key = None if rng is None else jax.random.fold_in(rng, depth)
        state, trace = body(blocks.layer_slice(params, whole, depth), state, key)
        traces.append(
            jax.tree.map(lambda leaf: jnp.repeat(leaf[None], depth - whole, axis=0), trace)
        )
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)


def enter_rows(
    vcc: VccConfig,
    state: compression.State,
    layout: compression.Layout,
    chosen: compression.Selection,
    fine: jax.Array | None = None,
) -> Rows:
    """Returns the rows of a layer as `vcc` wants them: see `rows.gather_rows`."""
    return gather_rows(
        state,
        layout,
        chosen,
        scale_correction=vcc.scale_correction,
        exact_counts=vcc.exact_counts,
        keep_all=vcc.layout == "static",
        fine=fine,
    )
