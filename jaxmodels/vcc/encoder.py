"""The VCC transformer layer and the stack that mixes it with local and dense layers (section 3).

A VCC layer has exactly the parameters of the pre-norm transformer layer: any pre-norm checkpoint
loads, and one stack of parameters runs dense, in local segments, or compressed.
"""

import dataclasses
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention, blocks, layers, partitioning
from jaxmodels.trunks import bert
from jaxmodels.vcc import compression

_log = logging.getLogger(__name__)

KINDS = ("local", "vcc", "dense")
SELECTORS = ("attention", "random")
LAYOUTS = ("static", "gather")
OVERFLOWS = ("error", "warn", "demote")


@dataclasses.dataclass(frozen=True)
class VccConfig:
    """How a stack of layers compresses.

    Attributes:
      kinds: one of "local", "vcc", "dense" a layer.
      num_vip: p, VIP slots.
      block_size: b, tokens a block.
      num_fine_blocks: k, blocks opened a layer; more than there are is all of them.
      segment_length: g, tokens a local segment.
      selector: "attention" (the layer's own) or "random".
      explore_prob: chance, a training example and layer, of a random order instead.
      scale_correction: coarse keys count log(b) more, for the b tokens they stand for.
      straight_through: selection learns through the gates (False only for ablation).
      layout: "static" keeps all m coarse rows and masks the opened ones; "gather" drops them
        (exact r = p + k b + m - k rows). The numbers are the same.
      overflow: what `inputs.check_inputs` does with more VIPs than slots.

    Raises:
      ValueError: a setting out of its range.
    """

    kinds: tuple[str, ...]
    num_vip: int = 320
    block_size: int = 16
    num_fine_blocks: int = 44
    segment_length: int = 512
    selector: str = "attention"
    explore_prob: float = 0.1
    scale_correction: bool = True
    straight_through: bool = True
    layout: str = "static"
    overflow: str = "error"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            _one_of("kinds", kind, KINDS)
        _one_of("selector", self.selector, SELECTORS)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("overflow", self.overflow, OVERFLOWS)
        smallest = {"num_vip": 1, "block_size": 1, "num_fine_blocks": 0, "segment_length": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least {least}.")
        if not 0.0 <= self.explore_prob <= 1.0:
            raise ValueError(f"model.explore_prob={self.explore_prob}: must be within [0, 1].")

    def compressed_length(self, n: int) -> int:
        """Returns r = p + k b + (m - k), the rows a VCC layer runs on for `n` tokens."""
        m = (compression.padded_length(n, self.num_vip, self.block_size) - self.num_vip) // (
            self.block_size
        )
        k = min(self.num_fine_blocks, m)
        return self.num_vip + k * self.block_size + m - k


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"model.{name}={value!r}: use one of {', '.join(accepted)}.")


def layer_kinds(num_local: int, num_vcc: int) -> tuple[str, ...]:
    """Returns the published arrangement: local layers first, VCC layers after them."""
    return ("local",) * num_local + ("vcc",) * num_vcc


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
    ) -> compression.Selection:
        """Selects the blocks to open with this layer's own norm, queries and keys (3.4a).

        Args:
          state: before the layer.
          layout: of the sequence.
          rng: for exploration and random selection.
          explore: open random blocks in a share `explore_prob` of the examples.
        """
        vcc = self.vcc
        num_fine = min(vcc.num_fine_blocks, state.coarse.shape[1])
        query = self.attention.queries(self.attention_norm(state.vip))
        key = self.attention.keys(self.attention_norm(state.coarse))
        bias = attention.key_mask_bias(layout.block_mask)[:, None, None, :]
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
            weights, layout, num_fine, order_by=order, explored=explored, straight_through=learn
        )

    def encode(self, rows: compression.Rows, deterministic: bool = True) -> jax.Array:
        """Runs both branches on the r rows (3.4d): Y = (f + a) * sigma + X, [B, r, d] float32."""
        x, bias = rows.x, rows.bias[:, None, None, :]
        mixed = self.attention(self.attention_norm(x), bias, deterministic=deterministic)
        mixed = self.drop(mixed, deterministic)
        out = self.drop(self.ffn(self.ffn_norm(mixed + x)), deterministic)
        return (out + mixed) * rows.gate[..., None] + x


def run_vcc_layer(
    layer: VccLayer,
    params: Any,
    state: compression.State,
    layout: compression.Layout,
    rng: jax.Array | None = None,
    policy: str = "none",
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

    Returns:
      the state after the layer, and which blocks it opened.
    """
    deterministic = rng is None
    pick, drop = (None, None) if deterministic else jax.random.split(rng)
    variables = {"params": params}
    chosen = layer.apply(variables, state, layout, pick, not deterministic, method="choose")
    rows = compression.gather_rows(
        state,
        layout,
        chosen,
        scale_correction=layer.vcc.scale_correction,
        keep_all=layer.vcc.layout == "static",
    )

    def encode(variables: Any, rows: compression.Rows, key: jax.Array | None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return layer.apply(variables, rows, deterministic, rngs=rngs, method="encode")

    rows = rows.replace(x=partitioning.constrain_batch(rows.x))
    y = blocks.remat(encode, policy)(variables, rows, drop)
    return compression.scatter_rows(state, layout, chosen, y), chosen


def pad_length(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
    """Returns `x` with zeros appended along `axis` up to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


class VccEncoder(nn.Module):
    """The stack: local segments, VCC layers, dense layers, in any order, and the final norm.

    Attributes:
      trunk: sizes; pre-norm.
      vcc: how to compress, and the kind of every layer.
    """

    trunk: bert.BertConfig
    vcc: VccConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        vip_mask: jax.Array,
        deterministic: bool = True,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes a sequence; lengths that fit no whole segment or block are padded and cut back.

        Args:
          x: [B, n, d] embeddings.
          mask: [B, n], 1 on real tokens.
          vip_mask: [B, n], 1 on VIP tokens.
          deterministic: no dropout, no exploration; else an rng named "dropout" is needed.

        Returns:
          [B, n, d] float32 after the final norm, and what was opened: "fine_blocks"
          [VCC layers, B, k], "scores" [VCC layers, B, m], "order" [B, n'] (token index of each
          row; blocks start at row p). Empty without VCC layers.
        """
        init = blocks.stacked_init(self.trunk.make_layer(), len(self.vcc.kinds), self.trunk.d_model)
        params = self.param("layers", init)
        rng = None if deterministic else self.make_rng("dropout")
        opened: list[dict[str, jax.Array]] = []
        first = 0
        for kind, group in itertools.groupby(self.vcc.kinds):
            last = first + len(list(group))
            part = blocks.layer_slice(params, first, last)
            key = None if rng is None else jax.random.fold_in(rng, first)
            if kind == "vcc":
                x, trace = self._compressed(part, x, mask, vip_mask, key)
                opened.append(trace)
            elif kind == "local":
                x = self._local(part, x, mask, key)
            else:
                x = bert.run_dense_layers(self.trunk, part, x, mask, key)
            first = last
        x = layers.LayerNorm(self.trunk.norm_eps, name="final_norm")(x)
        return x, _join(opened)

    def _local(self, params: Any, x: jax.Array, mask: jax.Array, rng: Any) -> jax.Array:
        """Runs dense layers within independent segments of g tokens (section 3.1)."""
        batch, n, d = x.shape
        g = self.vcc.segment_length
        padded = g * -(-n // g)
        x, mask = pad_length(x, padded), pad_length(mask, padded)
        x, mask = x.reshape(-1, g, d), mask.reshape(-1, g)
        x = bert.run_dense_layers(self.trunk, params, x, mask, rng)
        return x.reshape(batch, padded, d)[:, :n]

    def _compressed(
        self, params: Any, x: jax.Array, mask: jax.Array, vip_mask: jax.Array, rng: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs VCC layers: enter once, leave once (section 3.2, 3.5)."""
        n, vcc = x.shape[1], self.vcc
        padded = compression.padded_length(n, vcc.num_vip, vcc.block_size)
        x, mask, vip_mask = (pad_length(a, padded) for a in (x, mask, vip_mask))
        state, layout = compression.enter(x, mask, vip_mask, vcc.num_vip, vcc.block_size)
        num_blocks = state.coarse.shape[1]
        if vcc.num_fine_blocks > num_blocks:  # said once a compilation
            _log.info(
                "num_fine_blocks=%d, but %d tokens make %d blocks: every block is opened.",
                *(vcc.num_fine_blocks, n, num_blocks),
            )
        layer = self.trunk.make_layer(VccLayer, vcc=vcc)

        def body(layer_params: Any, state: compression.State, key: Any) -> tuple[Any, Any]:
            state, chosen = run_vcc_layer(layer, layer_params, state, layout, key, self.trunk.remat)
            return state, {"fine_blocks": chosen.fine, "scores": chosen.scores}

        state, trace = blocks.scan_layers(body, params, state, rng)
        return compression.leave(state, layout)[:, :n], trace | {"order": layout.order}


def _join(opened: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Joins the traces of several runs of VCC layers along the layer axis."""
    if not opened:
        return {}
    joined = {
        name: jnp.concatenate([trace[name] for trace in opened])
        for name in ("fine_blocks", "scores")
    }
    return joined | {"order": opened[0]["order"]}
