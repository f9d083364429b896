"""The stack of layers: local segments, VCC layers and dense layers over one tree of parameters."""

import itertools
import logging
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core import attention, blocks, layers, partitioning
from jaxmodels.core.relative_bias import RelativeBias
from jaxmodels.core.stack import run_layers
from jaxmodels.vcc import compression, kernels
from jaxmodels.vcc.config import VccConfig
from jaxmodels.vcc.layer import RelativePositions, VccLayer, run_vcc_layers
from jaxmodels.vcc.rows import last_rows

_log = logging.getLogger(__name__)

Parts = tuple[Any, RelativePositions | None]  # parameters of layers, and the position bias
Masks = tuple[jax.Array, jax.Array]  # of real tokens and of VIPs
Encoded = tuple[jax.Array, dict[str, jax.Array]]


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


@struct.dataclass
class Document:
    """A document as the first VCC layer meets it, for any number of questions.

    It holds what does not depend on a question where `VccConfig.question_apart`: embeddings, local
    layers and initial compression, but nothing of the VCC layers, which read both.

    Attributes:
      coarse: C [B, m, d].
      difference: D [B, m, b, d].
      mask: M [B, m, b], 1 on real tokens.
      length: tokens, before they were padded to blocks.
    """

    coarse: jax.Array
    difference: jax.Array
    mask: jax.Array
    length: int = struct.field(pytree_node=False)

    def behind(self, question: jax.Array) -> jax.Array:
        """Returns the mask [B', p + length] of questions' masks [B', p], each with its document."""
        mask = self.mask.reshape(len(self.mask), -1)[:, : self.length].astype(question.dtype)
        mask = jnp.repeat(mask, len(question) // len(mask), axis=0)
        return jnp.concatenate([question, mask], axis=1)


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
        document: Document | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes a sequence; lengths that fit no whole segment or block are padded and cut back.

        Args:
          x: [B, n, d] embeddings.
          mask: [B, n], 1 on real tokens.
          vip_mask: [B, n], 1 on VIP tokens.
          deterministic: no dropout, no exploration; else an rng named "dropout" is needed.
          document: from `encode_document`; the other arguments are then the question's alone,
            n = p. A batch of several questions a document has those of one side by side.

        Returns:
          [B, n, d] float32 after the final norm (with a document: question and document), and what
          was opened: "fine_blocks" [VCC layers, B, k], "scores" [VCC layers, B, m], "order"
          [B, n'] (token index of each row; blocks start at row p). Empty without VCC layers.
          Where `vcc.cross_attention` is "rows": [B, r, d] of the rows of the last layer, and
          beside what was opened their "key_bias" [B, r] float32, for attention to them.

        Raises:
          ValueError: a document or a question of another length where none is wanted.
        """
        init = blocks.stacked_init(self.trunk.make_layer(), len(self.vcc.kinds), self.trunk.d_model)
        parts = (self.param("layers", init), self._relative())
        rng = None if deterministic else self.make_rng("dropout")
        if self.vcc.question_apart:
            x, opened = self._apart(parts, x, (mask, vip_mask), rng, document)
        elif document is not None:
            raise ValueError("a document without model.question_apart: its blocks would differ.")
        else:
            x, opened = self._mixed(parts, x, (mask, vip_mask), rng)
        norm = layers.RMSNorm if self.trunk.make_layer().norm == "rms" else layers.LayerNorm
        x = norm(self.trunk.norm_eps, name="final_norm")(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic), opened

    def encode_document(self, x: jax.Array, mask: jax.Array) -> Document:
        """Runs what comes before the first VCC layer on a document alone.

        Args:
          x: [B, n, d] embeddings; those of positions from p on, where there are positions.
          mask: [B, n], 1 on real tokens.

        Raises:
          ValueError: `vcc.question_apart` is off.
        """
        if not self.vcc.question_apart:
            raise ValueError("encode_document needs model.question_apart=True.")
        params = partitioning.unbox(self.variables["params"])
        parts = (params["layers"], self._relative(params.get("relative_bias")))
        return self._document(parts, x, mask)

    def _relative(self, params: Any = None) -> RelativePositions | None:
        """The shared position bias with its table, for use inside loops over layers."""
        if self.bias is None:
            return None
        bias = self.bias.clone(parent=None)
        if params is None:
            params = self.param("relative_bias", lambda rng: bias.init(rng, 1, 1)["params"])
        return RelativePositions(params, bias)

    def _mixed(self, parts: Parts, x: jax.Array, masks: Masks, rng: Any) -> Encoded:
        """Runs all layers, group by group of a kind."""
        opened: list[dict[str, jax.Array]] = []
        (params, relative), first, n = parts, 0, x.shape[1]
        for kind, group in itertools.groupby(self.vcc.kinds):
            last = first + len(list(group))
            part = blocks.layer_slice(params, first, last)
            key = None if rng is None else jax.random.fold_in(rng, first)
            if kind == "vcc":
                entered = self._enter(x, masks, relative)
                x, trace = self._compressed(
                    (part, relative), *entered, key, last == len(self.vcc.kinds)
                )
                x = x if "key_bias" in trace else x[:, :n]
                opened.append(trace)
            elif kind == "local":
                x = self._local(part, x, masks[0], key, relative)
            else:
                x = self._dense(part, x, masks[0], key, relative)
            first = last
        return x, _join(opened)

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

    def _enter(
        self, x: jax.Array, masks: Masks, relative: RelativePositions | None
    ) -> tuple[compression.State, compression.Layout]:
        """Compresses a sequence padded to whole blocks (section 3.2)."""
        vcc = self.vcc
        x, mask, vip_mask = (pad_length(a, vcc.padded_length(x.shape[1])) for a in (x, *masks))
        positions = None
        if relative is not None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), mask.shape)
        run = kernels.blocks(vcc.kernels, vcc.block_size, x.shape[-1])
        return compression.enter(
            *(x, mask, vip_mask, vcc.num_vip, vcc.block_size, positions), run.enter
        )

    def _compressed(
        self,
        parts: Parts,
        state: compression.State,
        layout: compression.Layout,
        rng: Any,
        at_end: bool,
    ) -> Encoded:
        """Runs VCC layers, and leaves once (section 3.5); or keeps the rows for a decoder."""
        vcc, (params, relative), num_blocks = self.vcc, parts, state.coarse.shape[1]
        if vcc.num_fine_blocks > num_blocks:  # said once a compilation
            _log.info(
                "num_fine_blocks=%d, but there are %d blocks: every block is opened.",
                *(vcc.num_fine_blocks, num_blocks),
            )
        state, trace = run_vcc_layers(
            *(self.vcc_layer(), params, state, layout, rng, self.trunk.remat, relative)
        )
        trace |= {"order": layout.order}
        if at_end and vcc.cross_attention == "rows":
            x, bias = last_rows(state, layout, trace["fine_blocks"][-1])
            return x, trace | {"key_bias": bias}
        run = kernels.blocks(vcc.kernels, vcc.block_size, state.vip.shape[-1])
        return compression.leave(state, layout, run.leave), trace

    def _document(self, parts: Parts, x: jax.Array, mask: jax.Array, rng: Any = None) -> Document:
        vcc, (params, relative), n = self.vcc, parts, x.shape[1]
        local = vcc.kinds.count("local")
        if local:
            x = self._local(blocks.layer_slice(params, 0, local), x, mask, rng, relative)
        padded = vcc.padded_length(vcc.num_vip + n) - vcc.num_vip
        x, mask = pad_length(x, padded), pad_length(mask, padded).astype(jnp.float32)
        x = x * mask[..., None].astype(x.dtype)
        shape = (len(x), -1, vcc.block_size)
        x, mask = x.reshape(*shape, x.shape[-1]), mask.reshape(shape)
        run = kernels.blocks(vcc.kernels, vcc.block_size, x.shape[-1])
        return Document(*run.enter(x, mask), mask, n)

    def _apart(
        self, parts: Parts, x: jax.Array, masks: Masks, rng: Any, document: Document | None
    ) -> Encoded:
        """Question and document, each alone up to the first VCC layer, and both from there on."""
        vcc, (params, relative), p = self.vcc, parts, self.vcc.num_vip
        local, keys = vcc.kinds.count("local"), [None] * 3
        if rng is not None:
            keys = list(jax.random.split(rng, 3))
        if document is None and x.shape[1] > p:
            document = self._document(parts, x[:, p:], masks[0][:, p:], keys[0])
        elif document is None or x.shape[1] != p:
            raise ValueError(
                f"{x.shape[1]} tokens {'and no' if document is None else 'beside a'} document: "
                f"model.question_apart wants model.num_vip={p} tokens of question (padded), and "
                "the document behind them or encoded before."
            )
        x, mask, vip_mask = (a[:, :p] for a in (x, *masks))
        repeats = len(x) // len(document.mask)
        if repeats != 1:
            document = jax.tree.map(lambda leaf: jnp.repeat(leaf, repeats, axis=0), document)
        if local:
            x = self._local(blocks.layer_slice(params, 0, local), x, mask, keys[1], relative)
        x = x * mask[..., None].astype(x.dtype)
        layout = _apart_layout(document.mask, mask, vip_mask)
        if relative is None:
            layout = layout.replace(positions=None)
        state = compression.State(x, document.coarse, document.difference)
        part = blocks.layer_slice(params, local, len(vcc.kinds))
        x, opened = self._compressed((part, relative), state, layout, keys[2], True)
        return (x if "key_bias" in opened else x[:, : p + document.length]), opened

    def vcc_layer(self) -> VccLayer:
        """Returns one unbound VCC layer of the trunk's sizes."""
        changes = {} if self.drop_weights else {"attention_dropout_rate": 0.0}
        return self.trunk.make_layer(cls=VccLayer, vcc=self.vcc, **changes)


def _apart_layout(
    document: jax.Array, question: jax.Array, vip_mask: jax.Array
) -> compression.Layout:
    """The layout of p slots that hold the question, in the order of the text, and a document.

    Args:
      document: M [B, m, b].
      question: [B, p], 1 on real tokens.
      vip_mask: [B, p], 1 on tokens that vote.
    """
    batch, m, b = document.shape
    p = question.shape[1]
    order = jnp.broadcast_to(jnp.arange(p + m * b, dtype=jnp.int32), (batch, p + m * b))
    within = order[:, p:].reshape(batch, m, b)
    positions = compression.Positions(order[:, :p], within, compression.block_positions(within))
    question, votes = (a.astype(jnp.float32) for a in (question, vip_mask * question))
    return compression.Layout(order, question, votes, document, positions)


def _join(opened: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Joins the traces of several runs of VCC layers along the layer axis."""
    if not opened:
        return {}
    joined = {
        name: jnp.concatenate([trace[name] for trace in opened])
        for name in ("fine_blocks", "scores")
    }
    return opened[-1] | joined | {"order": opened[0]["order"]}
