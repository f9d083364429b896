"""The stack of layers: local segments, VCC layers and dense layers over one tree of parameters."""

import itertools
import logging
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention, blocks, layers
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.core.stack import run_layers
from jaxmodels.vcc import compression
from jaxmodels.vcc.config import VccConfig
from jaxmodels.vcc.layer import RelativePositions, VccLayer, run_vcc_layer

_log = logging.getLogger(__name__)


class Trunk(Protocol):
    """What the stack asks of a trunk's sizes; `bert.BertConfig` and `t5.T5Config` have it.

    Attributes:
      d_model: width of the residual stream.
      norm_eps: of the norms.
      remat: remat policy of the layers.
    """

    d_model: int
    norm_eps: float
    remat: str

    def make_layer(self, *, cls: type[blocks.TransformerLayer] = ..., **changes: Any) -> Any:
        """Returns one unbound layer of class `cls`, with fields changed or added."""


def pad_length(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
    """Returns `x` with zeros appended along `axis` up to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


class VccEncoder(nn.Module):
    """The stack: local segments, VCC layers, dense layers, in any order, and the final norm.

    Parameters are those of the trunk's own stack: `layers`, `final_norm` and, with a position
    bias, `relative_bias`.

    Attributes:
      trunk: sizes of a pre-norm trunk.
      vcc: how to compress, and the kind of every layer.
      bias: unbound relative position bias that all layers share (T5), or None.
      mask_value: key bias of padding in local and dense layers.
      drop_weights: VCC layers drop attention weights at the trunk's rate while training.
      dropout_rate: after the final norm while training.
    """

    trunk: Trunk
    vcc: VccConfig
    bias: RelativeBias | None = None
    mask_value: float = attention.MASK_BIAS
    drop_weights: bool = True
    dropout_rate: float = 0.0

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
        relative = self._relative()
        rng = None if deterministic else self.make_rng("dropout")
        opened: list[dict[str, jax.Array]] = []
        first = 0
        for kind, group in itertools.groupby(self.vcc.kinds):
            last = first + len(list(group))
            part = blocks.layer_slice(params, first, last)
            key = None if rng is None else jax.random.fold_in(rng, first)
            if kind == "vcc":
                x, trace = self._compressed(part, x, (mask, vip_mask), key, relative)
                opened.append(trace)
            elif kind == "local":
                x = self._local(part, x, mask, key, relative)
            else:
                x = self._dense(part, x, mask, key, relative)
            first = last
        norm = layers.RMSNorm if self.trunk.make_layer().norm == "rms" else layers.LayerNorm
        x = norm(self.trunk.norm_eps, name="final_norm")(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic), _join(opened)

    def _relative(self) -> RelativePositions | None:
        """The shared position bias with its table, for use inside loops over layers."""
        if self.bias is None:
            return None
        bias = self.bias.clone(parent=None)
        params = self.param("relative_bias", lambda rng: bias.init(rng, 1, 1)["params"])
        return RelativePositions(params, bias)

    def _dense(
        self, params: Any, x: jax.Array, mask: jax.Array, rng: Any, relative: Any
    ) -> jax.Array:
        """Runs the trunk's own layers."""
        bias = attention.key_mask_bias(mask, self.mask_value)[:, None, None, :]
        if relative is not None:
            bias = bias + relative.along(x.shape[1])
        return run_layers(self.trunk.make_layer(), params, x, bias, rng, self.trunk.remat)

    def _local(
        self, params: Any, x: jax.Array, mask: jax.Array, rng: Any, relative: Any
    ) -> jax.Array:
        """Runs dense layers within independent segments of g tokens (section 3.1)."""
        batch, n, d = x.shape
        g = self.vcc.segment_length
        padded = g * -(-n // g)
        x, mask = pad_length(x, padded), pad_length(mask, padded)
        x, mask = x.reshape(-1, g, d), mask.reshape(-1, g)
        # Positions within a segment differ as those in the text do: the relative bias is the same.
        x = self._dense(params, x, mask, rng, relative)
        return x.reshape(batch, padded, d)[:, :n]

    def _compressed(
        self, params: Any, x: jax.Array, masks: tuple[jax.Array, jax.Array], rng: Any, relative: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs VCC layers: enter once, leave once (section 3.2, 3.5)."""
        n, vcc = x.shape[1], self.vcc
        padded = compression.padded_length(n, vcc.num_vip, vcc.block_size)
        x, mask, vip_mask = (pad_length(a, padded) for a in (x, *masks))
        positions = None
        if relative is not None:
            positions = jnp.broadcast_to(jnp.arange(padded), mask.shape)
        state, layout = compression.enter(x, mask, vip_mask, vcc.num_vip, vcc.block_size, positions)
        num_blocks = state.coarse.shape[1]
        if vcc.num_fine_blocks > num_blocks:  # said once a compilation
            _log.info(
                "num_fine_blocks=%d, but %d tokens make %d blocks: every block is opened.",
                *(vcc.num_fine_blocks, n, num_blocks),
            )
        layer, policy = self.vcc_layer(), self.trunk.remat

        def body(one: Any, state: compression.State, key: Any) -> tuple[Any, Any]:
            state, chosen = run_vcc_layer(layer, one, state, layout, key, policy, relative)
            return state, {"fine_blocks": chosen.fine, "scores": chosen.scores}

        state, trace = blocks.scan_layers(body, params, state, rng)
        return compression.leave(state, layout)[:, :n], trace | {"order": layout.order}

    def vcc_layer(self) -> VccLayer:
        """Returns one unbound VCC layer of the trunk's sizes."""
        changes = {} if self.drop_weights else {"attention_dropout_rate": 0.0}
        return self.trunk.make_layer(cls=VccLayer, vcc=self.vcc, **changes)


def _join(opened: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Joins the traces of several runs of VCC layers along the layer axis."""
    if not opened:
        return {}
    joined = {
        name: jnp.concatenate([trace[name] for trace in opened])
        for name in ("fine_blocks", "scores")
    }
    return joined | {"order": opened[0]["order"]}
