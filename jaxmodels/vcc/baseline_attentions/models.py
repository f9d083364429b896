"""RoBERTa and T5 with a sparse encoder, called as VCC's own models: a comparison is one flag."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core.generation import Prepared, Started
from jaxmodels.trunks import bert, t5
from jaxmodels.vcc.baseline_attentions.bigbird import BigBird
from jaxmodels.vcc.baseline_attentions.longt5 import LongT5
from jaxmodels.vcc.baseline_attentions.sparse import (
    SparseLayer,
    SparsePattern,
    SparseStack,
    SparseT5Stack,
)
from jaxmodels.vcc.baseline_attentions.window import Window

# The baselines of the paper, with their published sizes.
PATTERNS: dict[str, SparsePattern] = {
    "window": Window(window=512, num_global=1),
    "longt5": LongT5(radius=127, global_block_size=16),
    "longt5_local": LongT5(radius=127, global_block_size=0),
    "bigbird": BigBird(block_size=64, num_random_blocks=3),
}


def sparse_pattern(name: str, **changes: object) -> SparsePattern:
    """Returns the pattern of a baseline by the name of its flag.

    Args:
      name: "window" (Longformer, LED), "longt5", "longt5_local" or "bigbird".
      **changes: fields of its class that differ from the published sizes.

    Raises:
      ValueError: an unknown name or field, or a size out of range.
    """
    if name not in PATTERNS:
        raise ValueError(f"encoder={name!r}: use one of {', '.join(PATTERNS)}.")
    pattern = PATTERNS[name]
    fields = sorted(vars(pattern))
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        raise ValueError(f"encoder={name!r} has no setting {unknown}; it has {fields}.")
    return type(pattern)(**(vars(pattern) | changes))


class SparseRoberta(nn.Module):
    """RoBERTa with a sparse encoder, pre- or post-norm.

    Parameters are those of a `bert.BertModel` of the same sizes (without pooler); patterns that
    summarise add `encoder/layers/global_norm`.

    Attributes:
      trunk: sizes.
      pattern: which keys a query reads.
    """

    trunk: bert.BertConfig
    pattern: SparsePattern

    def setup(self) -> None:
        trunk = self.trunk
        self.embeddings = trunk.make_embeddings("embeddings")
        self.encoder = SparseStack(
            trunk.make_layer(SparseLayer, pattern=self.pattern),
            trunk.num_layers,
            trunk.layer_hooks,
            "layer" if trunk.norm_order == "pre" else "",
            remat=trunk.remat,
        )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        vip_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes ids; lengths that fit no whole chunk or block are padded and cut back.

        Args:
          input_ids: [batch, length] int.
          attention_mask: [batch, length], 1 on real tokens; default all ones.
          vip_mask: [batch, length], 1 on VIP tokens; needed where they are the global tokens.
          token_type_ids: [batch, length] int; default zeros.
          position_ids: [batch, length] int from 0, below max_positions; default 0, 1, 2, ...
          deterministic: no dropout; else an rng named "dropout" is needed.

        Returns:
          hidden states [batch, length, d_model] float32, and nothing that was opened, {}.

        Raises:
          ValueError: no position ids, and the input is longer than the position table; no VIP
            mask where the pattern needs one.
        """
        shape = input_ids.shape
        if attention_mask is None:
            attention_mask = jnp.ones(shape, jnp.int32)
        if position_ids is None:
            bert.check_length(shape[1], self.trunk.max_positions)
            position_ids = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        x = self.embeddings(input_ids, position_ids, token_type_ids, deterministic)
        bias = self.encoder.prepare(attention_mask, vip_mask)
        return self.encoder(x, bias, deterministic), {}


class SparseT5(t5.T5):
    """T5 with a sparse encoder; the decoder is T5's own and reads all encoder states.

    Parameters are those of `t5.T5` of the same sizes; patterns that summarise add
    `encoder/layers/global_norm` and `encoder/global_relative_bias`.

    Attributes:
      config: sizes.
      pattern: which keys a query reads.
    """

    pattern: SparsePattern

    def make_encoder(self) -> nn.Module:
        """Returns the encoder's stack."""
        config = self.config
        return SparseT5Stack(
            layer=config.make_layer(cls=SparseLayer, pattern=self.pattern),
            num_layers=config.num_layers,
            layer_hooks=config.encoder_hooks,
            final_norm="rms",
            dropout_rate=config.dropout_rate,
            remat=config.remat,
            bias=config.make_bias(),
        )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        deterministic: bool = True,
        *,
        vip_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, T, vocab_size] float32; `decoder_input_ids` default to a start token.

        Args: as `encode` and `t5.T5.decode`.
        """
        if decoder_input_ids is None:
            decoder_input_ids = self.start_tokens(input_ids.shape[0])
        encoded = self.encode(
            input_ids, attention_mask, vip_mask=vip_mask, deterministic=deterministic
        )
        hidden = self.decode(
            decoder_input_ids, encoded, attention_mask, decoder_attention_mask, deterministic
        )
        return self.head(hidden)

    def encode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        vip_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes ids or embeddings.

        Args:
          input_ids: [B, n] int.
          attention_mask: [B, n], 1 on real tokens; default all ones.
          vip_mask: [B, n], 1 on VIP tokens; needed where they are the global tokens.
          inputs_embeds: [B, n, d_model], in place of ids.
          deterministic: no dropout; else an rng named "dropout" is needed.

        Returns:
          [B, n, d_model] float32, after the final norm.

        Raises:
          ValueError: ids and embeddings together, or neither; no VIP mask where one is needed.
        """
        x = self.words(input_ids, inputs_embeds)
        mask = jnp.ones(x.shape[:2], jnp.int32) if attention_mask is None else attention_mask
        bias = self.encoder.prepare(mask, vip_mask)
        x = self.dropout(x, deterministic=deterministic)
        return self.encoder(x, bias, deterministic)

    def start(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        max_new_tokens: int,
        prepared: Prepared | None = None,
        inputs_embeds: jax.Array | None = None,
        vip_mask: jax.Array | None = None,
    ) -> Started:
        """Encodes once, and decodes the start token: see `core.generation`."""
        encoded = self.encode(
            input_ids, attention_mask, vip_mask=vip_mask, inputs_embeds=inputs_embeds
        )
        return self.start_from(
            encoded, attention_mask, max_new_tokens=max_new_tokens, prepared=prepared
        )
