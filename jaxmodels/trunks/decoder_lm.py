"""Decoder-only language models: GPT-2, and the Llama type (Llama, Mistral, Qwen2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core import attention, layers
from jaxmodels.core.generation import Prepared, Started, check_left_padded
from jaxmodels.core.kv_cache import KVCache
from jaxmodels.trunks.decoder_config import SIZES, DecoderConfig
from jaxmodels.trunks.lm_head import LMHead, logits

__all__ = ["SIZES", "DecoderConfig", "DecoderLM", "LMHead", "token_log_probs"]


class DecoderEmbeddings(nn.Module):
    """word[id], and position[position id] where positions are learned.

    Attributes:
      vocab_size: rows of the word table.
      d_model: width.
      position_rows: rows of the position table; 0: none.
    """

    vocab_size: int
    d_model: int
    position_rows: int = 0

    def setup(self) -> None:
        self.word = layers.Embedding(self.vocab_size, self.d_model)
        if self.position_rows:
            self.position = layers.Embedding(self.position_rows, self.d_model, (None, "embed"))


@struct.dataclass
class Fixed:
    """What stays while tokens are generated.

    Attributes:
      mask: [B, places], 1 on real tokens of the prompt and on all new ones.
      shift: [B], what is added to a place to give its position.
      prepared: the parameters as steps read them.
    """

    mask: jax.Array
    shift: jax.Array
    prepared: Prepared


class DecoderLM(nn.Module):
    """Embeddings, decoder and head of a decoder-only language model.

    Parameters: `embeddings` (`word`, and `position` where learned), `decoder` (`layers`,
    `final_norm`, hooks) and, untied, `lm_head`.

    Attributes:
      config: sizes; a Hugging Face checkpoint loads with `jaxmodels.weights`.
    """

    left_padded = True  # see `core.generation`; without a type, not a field

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        rows = 0 if config.rotary else config.max_positions
        self.embeddings = DecoderEmbeddings(config.vocab_size, config.d_model, rows)
        self.decoder = config.make_stack()
        if not config.tied_head:
            self.lm_head = LMHead(config.d_model, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout_rate)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the word embeddings of ids [B, L] int -> [B, L, d_model] float32."""
        return self.embeddings.word(ids)

    def decode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs whole sequences.

        Args:
          input_ids: [B, L] int.
          attention_mask: [B, L], 1 on real tokens, which may be padded on either side; default all
            ones.
          inputs_embeds: [B, L, d_model] in place of ids (soft prompts in front of `embed(ids)`).
          position_ids: [B, L] int; default: how many real tokens come before.
          deterministic: no dropout; else an rng named "dropout" is needed.

        Returns:
          [B, L, d_model] float32, after the final norm; `head` makes logits of it.

        Raises:
          ValueError: ids and embeddings are both given, or neither; learned positions run out.
        """
        x, positions = self._inputs(input_ids, attention_mask, inputs_embeds, position_ids)
        x = self.dropout(x, deterministic=deterministic)
        bias = _bias(x.shape[1], attention_mask)
        return self.decoder(x, bias, deterministic, positions=positions)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., vocab_size] float32 of decoder outputs [..., d_model]."""
        return logits(hidden, self.head_kernel(), self.config.dtype)

    def head_kernel(self) -> jax.Array:
        """Returns the head's kernel [d_model, vocab_size], tied or not."""
        tied = self.config.tied_head
        return self.embeddings.word.embedding.T if tied else self.lm_head.kernel

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns logits [B, L, vocab_size] float32; arguments as for `decode`."""
        hidden = self.decode(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            deterministic=deterministic,
        )
        return self.head(hidden)

    def score(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, chunk: int = 128
    ) -> tuple[jax.Array, jax.Array]:
        """Returns what the model thinks of each token after those before it.

        The log-likelihood of a continuation is the sum over its places; greedy decoding would
        have written it where all its places are the most probable.

        Args:
          input_ids: [B, L] int.
          attention_mask: [B, L], 1 on real tokens; default all ones.
          chunk: see `token_log_probs`.

        Returns:
          ([B, L] float32 log-probabilities, [B, L] bool: it is the most probable token); 0 and
          False for padding and for the first token of a row.
        """
        hidden = self.decode(input_ids, attention_mask)
        targets = input_ids[:, 1:]
        if attention_mask is not None:
            known = (attention_mask[:, 1:] == 1) & (attention_mask[:, :-1] == 1)
            targets = jnp.where(known, targets, -1)
        found = token_log_probs(
            hidden[:, :-1], self.head_kernel(), targets, chunk=chunk, dtype=self.config.dtype
        )
        return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in found)

    def prepare(self) -> Prepared:
        """Returns the parameters as steps read them: see `core.generation`."""
        kernel = layers.for_few_rows(self.head_kernel().astype(self.config.dtype))
        return Prepared(self.decoder.unstacked(), kernel)

    def start(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        max_new_tokens: int,
        prepared: Prepared | None = None,
        inputs_embeds: jax.Array | None = None,
        position_ids: jax.Array | None = None,
    ) -> Started:
        """Runs the prompts: see `core.generation`.

        Args:
          input_ids: [B, P] int, padded on the left (`decoding.pad_to_bucket`).
          attention_mask: [B, P], 1 on real tokens; [B, P'] of `inputs_embeds`.
          max_new_tokens: tokens to make room for.
          prepared: from `prepare`, where that is at hand.
          inputs_embeds: [B, P', d_model] to run in place of the ids, P' >= P: soft prompts may
            stand in front.
          position_ids: [B, P'] int; default: how many real tokens come before. New tokens count on
            from the last one (a prefix of keys and values may take the first positions).

        Raises:
          ValueError: learned positions run out, the shapes disagree, or padding is not in front.
        """
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = embeds.shape[:2]
        if length < input_ids.shape[1]:
            raise ValueError(
                f"inputs_embeds of length {length} for prompts of {input_ids.shape[1]} tokens: "
                "embed all of them."
            )
        check_left_padded(attention_mask, input_ids.shape[1])
        mask = jnp.ones((batch, length), jnp.int32) if attention_mask is None else attention_mask
        # The last new token is chosen and never read.
        places = length + max_new_tokens - 1
        self._check_length(places)
        x, positions = self._inputs(None, mask, embeds, position_ids)
        bias = _bias(length, attention_mask)
        x, caches = self.decoder.prefill(x, places, bias, positions=positions)
        kept = jnp.pad(mask, ((0, 0), (0, max_new_tokens - 1)), constant_values=1)
        fixed = Fixed(
            kept,
            positions[:, -1] + 1 - length,
            self.prepare() if prepared is None else prepared,
        )
        prompt_mask = None if attention_mask is None else mask[:, length - input_ids.shape[1] :]
        return Started(input_ids, prompt_mask, self.head(x[:, -1]), caches, fixed)

    def step(
        self, tokens: jax.Array, caches: tuple[KVCache, ...], fixed: Fixed
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Runs one token a row: see `core.generation`; tokens [N] int32."""
        beams = tokens.shape[0] // fixed.mask.shape[0]
        mask, shift = (jnp.repeat(x, beams, axis=0) for x in (fixed.mask, fixed.shift))
        positions = (caches[0].length + shift)[:, None]
        x = self._place(self.embed(tokens[:, None]), positions)
        bias = attention.hidden_keys_bias(mask)
        x, caches = self.decoder.decode(
            x, caches, bias, positions=positions, layer_params=fixed.prepared.layer_params
        )
        return logits(x[:, 0], fixed.prepared.head_kernel, self.config.dtype), caches

    def _inputs(
        self,
        input_ids: jax.Array | None,
        attention_mask: jax.Array | None,
        inputs_embeds: jax.Array | None,
        positions: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream [B, L, d_model] at its start, and positions [B or 1, L]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {attention_mask.shape}, the input {x.shape[:2]}: make "
                "them equal."
            )
        if positions is None:
            self._check_length(x.shape[1])
            positions = jnp.arange(x.shape[1])[None]
            if attention_mask is not None:
                positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        return self._place(x, positions), positions

    def _place(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.config.rotary else x + self.embeddings.position(positions)

    def _check_length(self, length: int) -> None:
        most = self.config.max_positions
        if self.config.rotary is None and length > most:
            raise ValueError(
                f"{length} tokens, prompt and new ones together, but the position table has "
                f"{most} positions; shorten the prompt or ask for fewer new tokens."
            )


def _bias(length: int, mask: jax.Array | None) -> jax.Array:
    causal = attention.causal_bias(length, length)
    if mask is None:
        return causal
    return causal + attention.hidden_keys_bias(mask)


def token_log_probs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    chunk: int = 128,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of given tokens, without the logits of all places at once.

    The logits of one chunk of places live at a time, in the backward pass too.

    Args:
      hidden: [B, T, d_model], decoder outputs at the places before the targets.
      kernel: [d_model, vocab] of the head.
      targets: [B, T] int; a negative one (-100) counts as none.
      chunk: places at once.
      dtype: of the product.

    Returns:
      ([B, T] float32: log softmax(hidden kernel)[target], [B, T] bool: the target is the most
      probable token); 0 and False where there is no target.
    """
    batch, length = targets.shape
    size = max(1, min(chunk, length))
    pad = -length % size
    hidden = jnp.pad(hidden.astype(dtype), ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1)
    kernel = kernel.astype(dtype)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = logits(hidden, kernel, dtype)
        known = targets >= 0
        index = jnp.where(known, targets, 0)
        picked = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
        log_probs = picked - jax.nn.logsumexp(scores, axis=-1)
        return jnp.where(known, log_probs, 0.0), known & (scores.argmax(-1) == targets)

    chunks = (
        jnp.moveaxis(hidden.reshape(batch, -1, size, hidden.shape[-1]), 1, 0),
        jnp.moveaxis(targets.reshape(batch, -1, size), 1, 0),
    )
    _, found = jax.lax.scan(lambda _, x: (None, one(*x)), None, chunks)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in found)
