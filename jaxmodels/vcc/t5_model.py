"""VCC-T5: the encoder compresses around VIP tokens, the decoder is T5's own (section 3.7)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention
from jaxmodels.core.generation import Prepared, Started
from jaxmodels.trunks import t5
from jaxmodels.vcc.config import VccConfig
from jaxmodels.vcc.encoder import Document, VccEncoder

Opened = dict[str, jax.Array]


class VccT5(t5.T5):
    """T5 whose encoder layers compress around VIP tokens.

    Parameters are those of `t5.T5` of the same sizes: every T5 checkpoint loads as it is. The
    decoder cross-attends to all n encoder states, decompressed. It generates with
    `decoding.Generator`, which passes the VIP mask on and runs the encoder once:

        generator(params, input_ids, attention_mask, vip_mask=vip_mask)

    Attributes:
      config: sizes, without encoder hooks.
      vcc: how to compress, and the kind of every encoder layer.

    Raises:
      ValueError: a list of kinds of another length than num_layers, or hooks in the encoder.
    """

    vcc: VccConfig

    def make_encoder(self) -> nn.Module:
        """Returns the mixed stack of encoder layers."""
        config = self.config
        if len(self.vcc.kinds) != config.num_layers:
            raise ValueError(
                f"{len(self.vcc.kinds)} layer kinds for model.num_layers={config.num_layers}; "
                "give one kind a layer."
            )
        if config.encoder_hooks:
            raise ValueError("VCC layers have no hooks: leave encoder_hooks empty, or use t5.T5.")
        return VccEncoder(
            config,
            self.vcc,
            bias=config.make_bias(),
            mask_value=attention.HIDDEN,
            drop_weights=False,
            dropout_rate=config.dropout_rate,
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
        encoded, opened = self.encode_traced(
            input_ids, attention_mask, vip_mask=vip_mask, deterministic=deterministic
        )
        hidden = self.decode(
            decoder_input_ids,
            encoded,
            None if "key_bias" in opened else attention_mask,
            decoder_attention_mask,
            deterministic,
            context_bias=opened.get("key_bias"),
        )
        return self.head(hidden)

    def encode_document(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> Document:
        """Encodes a document once, for any number of questions (`VccConfig.question_apart`).

            document = model.apply(variables, ids, mask, method="encode_document")
            generator(params, question, mask, vip_mask=mask, document=document)

        Args:
          input_ids: [B, n] int.
          attention_mask: [B, n], 1 on real tokens; default all ones.

        Raises:
          ValueError: `vcc.question_apart` is off.
        """
        mask = jnp.ones(input_ids.shape, jnp.int32) if attention_mask is None else attention_mask
        return self.encoder.encode_document(self.words(input_ids, None), mask)

    def encode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        vip_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns the encoder's states [B, n, d_model] float32; arguments as `encode_traced`."""
        return self.encode_traced(
            input_ids,
            attention_mask,
            vip_mask=vip_mask,
            inputs_embeds=inputs_embeds,
            deterministic=deterministic,
        )[0]

    def encode_traced(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        vip_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        deterministic: bool = True,
        document: Document | None = None,
    ) -> tuple[jax.Array, Opened]:
        """Encodes ids or embeddings, and tells which blocks were opened.

        Args:
          input_ids: [B, n] int.
          attention_mask: [B, n], 1 on real tokens; default all ones.
          vip_mask: [B, n], 1 on VIP tokens (`inputs.check_inputs` checks them).
          inputs_embeds: [B, n, d_model], in place of ids.
          deterministic: no dropout, no exploration; else an rng named "dropout" is needed.
          document: from `encode_document`; the others are then the question's, n = p.

        Returns:
          [B, n, d_model] float32 in text order, after the final norm, and what each VCC layer
          opened (see `VccEncoder`; also for what `vcc.cross_attention` = "rows" returns).

        Raises:
          ValueError: no VIP mask though there are VCC layers, or ids and embeddings together.
        """
        x = self.words(input_ids, inputs_embeds)
        if vip_mask is None and "vcc" in self.vcc.kinds:
            raise ValueError(
                "vip_mask is missing: give [batch, length], 1 on the tokens of the question."
            )
        mask = jnp.ones(x.shape[:2], jnp.int32) if attention_mask is None else attention_mask
        x = self.dropout(x, deterministic=deterministic)
        vip_mask = jnp.zeros_like(mask) if vip_mask is None else vip_mask
        return self.encoder(x, mask, vip_mask, deterministic, document)

    def start(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        max_new_tokens: int,
        prepared: Prepared | None = None,
        inputs_embeds: jax.Array | None = None,
        vip_mask: jax.Array | None = None,
        document: Document | None = None,
    ) -> Started:
        """Encodes once, and decodes the start token: see `core.generation`."""
        encoded, opened = self.encode_traced(
            input_ids,
            attention_mask,
            vip_mask=vip_mask,
            inputs_embeds=inputs_embeds,
            document=document,
        )
        if document is not None and attention_mask is not None:
            attention_mask = document.behind(attention_mask)
        return self.start_from(
            encoded,
            None if "key_bias" in opened else attention_mask,
            max_new_tokens=max_new_tokens,
            prepared=prepared,
            context_bias=opened.get("key_bias"),
        )
