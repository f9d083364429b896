"""The VCC transformer layer (section 3.4), for every pre-norm trunk.

A VCC layer has exactly the parameters of the trunk's own layer: any pre-norm checkpoint loads, and
one stack of parameters runs dense, in local segments, or compressed.
"""

from typing import Any

import jax
from flax import struct

from jaxmodels.core import attention, blocks, partitioning
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.vcc import compression
from jaxmodels.vcc.config import VccConfig


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
        )

    def encode(
        self,
        rows: compression.Rows,
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
        rows: compression.Rows,
        deterministic: bool = True,
        relative: RelativePositions | None = None,
    ) -> jax.Array:
        """Returns the attention branch of the r rows, [B, r, d]: all are queries, keys, values."""
        x, bias = self.attention_norm(rows.x), rows.bias[:, None, None, :]
        if relative is not None:
            bias = bias + relative.at(rows.positions, rows.positions)
        return self.attention(x, bias, deterministic=deterministic)


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
    deterministic = rng is None
    pick, drop = (None, None) if deterministic else jax.random.split(rng)
    variables = {"params": params}
    explore = not deterministic
    chosen = layer.apply(variables, state, layout, pick, explore, relative, method="choose")
    rows = enter_rows(layer.vcc, state, layout, chosen)

    def encode(variables: Any, rows: compression.Rows, key: Any, relative: Any) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return layer.apply(variables, rows, deterministic, relative, rngs=rngs, method="encode")

    rows = rows.replace(x=partitioning.constrain_batch(rows.x))
    y = blocks.remat(encode, policy)(variables, rows, drop, relative)
    return compression.scatter_rows(state, layout, chosen, y), chosen


def enter_rows(
    vcc: VccConfig,
    state: compression.State,
    layout: compression.Layout,
    chosen: compression.Selection,
) -> compression.Rows:
    """Returns the rows of a layer as `vcc` wants them: see `compression.gather_rows`."""
    return compression.gather_rows(
        state,
        layout,
        chosen,
        scale_correction=vcc.scale_correction,
        exact_counts=vcc.exact_counts,
        keep_all=vcc.layout == "static",
    )
