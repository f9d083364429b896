"""What the encoder-decoder trunks (T5, BART) share: their call, and generation over caches."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core import attention, layers
from jaxmodels.core.generation import Prepared, Started
from jaxmodels.core.kv_cache import KVCache


@struct.dataclass
class Fixed:
    """What stays while tokens are generated.

    Attributes:
      contexts: a layer's keys and values of the encoder output, of the B examples.
      mask_bias: [B, 1, 1, L], added to scores of rows of the encoder output; 0 on real ones.
      prepared: the parameters as steps read them.
    """

    contexts: tuple[KVCache, ...]
    mask_bias: jax.Array
    prepared: Prepared


class EncoderDecoder(nn.Module):
    """Base of models with `encoder` and `decoder` stacks and a `config` with `start_id`, `dtype`.

    A trunk defines `embed`, `enter`, `place`, `head_kernel` and `project`; one whose positions end
    somewhere also `check_length`.
    """

    def head(self, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., vocab_size] float32 of decoder outputs [..., d_model]."""
        return self.project(hidden, self.head_kernel())

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns logits [B, T, vocab_size] float32; `decoder_input_ids` default to a start token.

        Args: as `encode` and `decode`.
        """
        if decoder_input_ids is None:
            decoder_input_ids = self.start_tokens(input_ids.shape[0])
        encoded = self.encode(input_ids, attention_mask, deterministic=deterministic)
        hidden = self.decode(
            decoder_input_ids, encoded, attention_mask, decoder_attention_mask, deterministic
        )
        return self.head(hidden)

    def words(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        """Returns the word embeddings that `encode` starts from.

        Raises:
          ValueError: ids and embeddings are both given, or neither.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("encode takes either input_ids or inputs_embeds: give one of them.")
        return self.embed(input_ids) if inputs_embeds is None else inputs_embeds

    def check_length(self, what: str, length: int) -> None:
        """Raises ValueError where an "input" or "output" of `length` tokens has no positions."""

    def encode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes ids, or embeddings (soft prompts in front of `embed(ids)`, say).

        Args:
          input_ids: [B, L] int.
          attention_mask: [B, L], 1 on real tokens; default all ones.
          inputs_embeds: [B, L, d_model], in place of ids.
          deterministic: no dropout; else an rng named "dropout" is needed.

        Returns:
          [B, L, d_model] float32, after the final norm where there is one.

        Raises:
          ValueError: ids and embeddings are both given, or neither; L is above the positions.
        """
        x = self.words(input_ids, inputs_embeds)
        self.check_length("input", x.shape[1])
        x, bias = self.enter("encoder", x, deterministic)
        if attention_mask is not None:
            bias = _sum(bias, attention.hidden_keys_bias(attention_mask))
        return self.encoder(x, bias, deterministic)

    def decode(
        self,
        decoder_input_ids: jax.Array,
        encoded: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        deterministic: bool = True,
        *,
        context_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the decoder on whole sequences (training).

        Args:
          decoder_input_ids: [B, T] int, see `shift_right`.
          encoded: [B, L, d_model], what it cross-attends to.
          attention_mask: [B, L], 1 on real rows of `encoded`; default all ones.
          decoder_attention_mask: [B, T], 1 on tokens that may be attended to; default all ones
            (padding behind a sequence is behind what the causal mask lets it see).
          deterministic: no dropout.
          context_bias: [B, L] float32, in place of `attention_mask`: added to the scores of a row
            of `encoded`, whatever attends to it.

        Returns:
          [B, T, d_model] float32, after the final norm where there is one; `head` makes logits of
          it.

        Raises:
          ValueError: T is above the positions.
        """
        length = decoder_input_ids.shape[1]
        self.check_length("output", length)
        x, bias = self.enter("decoder", self.embed(decoder_input_ids), deterministic)
        bias = _sum(bias, attention.causal_bias(length, length))
        if decoder_attention_mask is not None:
            bias = bias + attention.hidden_keys_bias(decoder_attention_mask)
        mask = None if attention_mask is None else attention.hidden_keys_bias(attention_mask)
        mask = mask if context_bias is None else context_bias[:, None, None, :]
        return self.decoder(x, bias, deterministic, context=encoded, context_bias=mask)

    def start_tokens(self, batch: int) -> jax.Array:
        """Returns the first decoder input, [batch, 1] int32."""
        return jnp.full((batch, 1), self.config.start_id, jnp.int32)

    def start(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        max_new_tokens: int,
        prepared: Prepared | None = None,
        inputs_embeds: jax.Array | None = None,
    ) -> Started:
        """Encodes, and decodes the start token: see `core.generation`."""
        encoded = self.encode(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        return self.start_from(
            encoded, attention_mask, max_new_tokens=max_new_tokens, prepared=prepared
        )

    def prepare(self) -> Prepared:
        """Returns the parameters as steps read them: see `core.generation`."""
        kernel = layers.for_few_rows(self.head_kernel().astype(self.config.dtype))
        return Prepared(self.decoder.unstacked(), kernel)

    def start_from(
        self,
        encoded: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        max_new_tokens: int,
        prepared: Prepared | None = None,
        context_bias: jax.Array | None = None,
    ) -> Started:
        """As `start`, from what the decoder is to attend to, [B, L, d_model].

        `context_bias` as for `decode`.

        Raises:
          ValueError: max_new_tokens is above the positions.
        """
        self.check_length("output", max_new_tokens)
        batch, length = encoded.shape[:2]
        if attention_mask is None:
            attention_mask = jnp.ones((batch, length), jnp.int32)
        mask_bias = attention.hidden_keys_bias(attention_mask)
        fixed = Fixed(
            self.decoder.context_caches(encoded),
            mask_bias if context_bias is None else context_bias[:, None, None, :],
            self.prepare() if prepared is None else prepared,
        )
        # The last new token is chosen and never read: max_new_tokens places hold all before it.
        caches = self.decoder.empty_caches(batch, max_new_tokens)
        prompt = self.start_tokens(batch)
        logits, caches = self.step(prompt[:, 0], caches, fixed)
        return Started(prompt, None, logits, caches, fixed)

    def step(
        self, tokens: jax.Array, caches: tuple[KVCache, ...], fixed: Fixed
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Decodes one token a row: see `core.generation`; tokens [N] int32."""
        x, bias = self.place(self.embed(tokens[:, None]), caches[0])
        x, caches = self.decoder.decode(
            x,
            *(caches, bias),
            contexts=fixed.contexts,
            context_bias=fixed.mask_bias,
            layer_params=fixed.prepared.layer_params,
        )
        return self.project(x[:, 0], fixed.prepared.head_kernel), caches


def _sum(bias: jax.Array | None, more: jax.Array) -> jax.Array:
    return more if bias is None else bias + more


def shift_right(labels: jax.Array, start_id: int, pad_id: int) -> jax.Array:
    """Returns decoder inputs [B, T] of labels [B, T]: start token in front, -100 as padding."""
    shifted = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    return jnp.where(shifted == -100, pad_id, shifted)
