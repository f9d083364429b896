"""Token, position and token-type embeddings, and how a position table grows."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import layers


class TokenEmbeddings(nn.Module):
    """norm(word[id] + position[position id + offset] + type[type id]), then dropout.

    Attributes:
      vocab_size: rows of the word table.
      d_model: width.
      position_rows: rows of the position table (RoBERTa: max positions + 2).
      num_token_types: rows of the token-type table.
      position_offset: added to position ids (RoBERTa: pad id + 1; BERT: 0).
      norm_eps: of the layer norm.
      dropout_rate: while training.
    """

    vocab_size: int
    d_model: int
    position_rows: int
    num_token_types: int
    position_offset: int = 0
    norm_eps: float = 1e-5
    dropout_rate: float = 0.0

    def setup(self) -> None:
        self.word = layers.Embedding(self.vocab_size, self.d_model)
        self.position = layers.Embedding(self.position_rows, self.d_model, (None, "embed"))
        self.token_type = layers.Embedding(self.num_token_types, self.d_model, (None, "embed"))
        self.norm = layers.LayerNorm(self.norm_eps)
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self,
        input_ids: jax.Array | None,
        position_ids: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
        *,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Embeds ids [B, L] int -> [B, L, d_model] float32.

        Args:
          input_ids: rows of the word table; not read where `inputs_embeds` are given.
          position_ids: [B, L] int.
          token_type_ids: [B, L] int; default zeros.
          deterministic: no dropout.
          inputs_embeds: [B, L, d_model], what stands for the rows of the word table.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(position_ids)
        word = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        x = word + self.token_type(token_type_ids)
        x = x + self.position(position_ids + self.position_offset)
        return self.dropout(self.norm(x), deterministic=deterministic)


def grow_position_table(table: Any, rows: int, offset: int = 2) -> Any:
    """Returns a longer position table that repeats the rows from `offset` on.

    Args:
      table: [old rows, d_model].
      rows: wanted rows, offset included.
      offset: leading rows that are no positions (RoBERTa: 2) and stay once, in front.

    Raises:
      ValueError: `rows` is below the old size.
    """
    if rows < table.shape[0]:
        raise ValueError(f"cannot grow a position table of {table.shape[0]} rows to {rows} rows.")
    body = table[offset:]
    copies = -(-(rows - offset) // body.shape[0])
    return jnp.concatenate([table[:offset], jnp.tile(body, (copies, 1))])[:rows]
