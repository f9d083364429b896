"""BERT and RoBERTa encoders: dense, post-norm as published, or pre-norm; with an MLM head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention, blocks, embeddings, layers, partitioning


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT-type encoder.

    Attributes:
      vocab_size: rows of the word table.
      d_model: width of the residual stream.
      num_layers: transformer layers.
      num_heads: attention heads; divides d_model.
      d_ff: inner width of the feed-forward.
      max_positions: longest input in tokens.
      num_token_types: rows of the token-type table.
      norm_order: "post" (as published) or "pre".
      norm_eps: 1e-12 for BERT, 1e-5 for RoBERTa.
      position_offset: 0 for BERT; pad id + 1 = 2 for RoBERTa, whose table has 2 rows more.
      pooler: has BERT's tanh projection of the first token.
      dropout_rate: hidden dropout.
      attention_dropout_rate: dropout of attention weights.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.

    Raises:
      ValueError: sizes that do not fit together.
    """

    vocab_size: int = 50265
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    max_positions: int = 512
    num_token_types: int = 1
    norm_order: str = "post"
    norm_eps: float = 1e-5
    position_offset: int = 2
    pooler: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; "
                "choose a divisor of the width."
            )
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1.")

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        return self.max_positions + self.position_offset

    def make_layer(self, cls: type[nn.Module] = blocks.TransformerLayer, **kwargs: Any) -> Any:
        """Returns one unbound layer of these sizes, of class `cls`."""
        return cls(
            num_heads=self.num_heads,
            d_model=self.d_model,
            d_ff=self.d_ff,
            norm_order=self.norm_order,
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
            parent=None,
            **kwargs,
        )

    def make_embeddings(self, name: str) -> embeddings.TokenEmbeddings:
        """Returns the embedding module of these sizes."""
        return embeddings.TokenEmbeddings(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            position_rows=self.position_rows,
            num_token_types=self.num_token_types,
            position_offset=self.position_offset,
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            name=name,
        )


def check_length(length: int, max_positions: int) -> None:
    """Raises ValueError where `length` tokens outrun the position table."""
    if length > max_positions:
        raise ValueError(
            f"input of {length} tokens, but the position table has {max_positions} positions; "
            "shorten the input, or grow the table with core.embeddings.grow_position_table."
        )


def run_dense_layers(
    config: BertConfig,
    params: Any,
    x: jax.Array,
    mask: jax.Array,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Runs dense transformer layers over stacked `params`.

    Args:
      config: sizes.
      params: layer parameters stacked on a leading axis.
      x: [B, L, d_model].
      mask: [B, L], 1 on real tokens.
      rng: for dropout; None drops nothing.

    Returns:
      [B, L, d_model] float32.
    """
    layer = config.make_layer()
    bias = attention.key_mask_bias(mask)[:, None, None, :]

    def body(layer_params: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
        rngs = None if key is None else {"dropout": key}
        y = layer.apply({"params": layer_params}, x, bias, key is None, rngs=rngs)
        return partitioning.constrain_batch(y), None

    return blocks.scan_layers(body, params, x, rng, config.remat)[0]


class Encoder(nn.Module):
    """The stack of dense layers: [B, L, d_model] -> [B, L, d_model]."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        config = self.config
        init = blocks.stacked_init(config.make_layer(), config.num_layers, config.d_model)
        params = self.param("layers", init)
        rng = None if deterministic else self.make_rng("dropout")
        x = run_dense_layers(config, params, x, mask, rng)
        if config.norm_order == "pre":
            x = layers.LayerNorm(config.norm_eps, name="final_norm")(x)
        return x


class BertModel(nn.Module):
    """Embeddings and encoder (and pooler) of BERT or RoBERTa.

    Attributes:
      config: sizes; a RoBERTa or BERT checkpoint loads with `jaxmodels.weights`.
    """

    config: BertConfig

    def setup(self) -> None:
        self.embeddings = self.config.make_embeddings("embeddings")
        self.encoder = Encoder(self.config)
        if self.config.pooler:
            self.pooler = layers.Dense(self.config.d_model, ("embed", "mlp"))

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes ids.

        Args:
          input_ids: [batch, length] int.
          attention_mask: [batch, length], 1 on real tokens; default all ones.
          token_type_ids: [batch, length] int; default zeros.
          position_ids: [batch, length] int from 0, below max_positions; default 0, 1, 2, ...
          deterministic: no dropout; else an rng named "dropout" is needed.

        Returns:
          [batch, length, d_model] float32.

        Raises:
          ValueError: no position ids, and the input is longer than the position table.
        """
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if position_ids is None:
            check_length(input_ids.shape[1], self.config.max_positions)
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.embeddings(input_ids, position_ids, token_type_ids, deterministic)
        if self.config.pooler and self.is_initializing():
            self.pool(x)
        return self.encoder(x, attention_mask, deterministic)

    def pool(self, hidden: jax.Array) -> jax.Array:
        """BERT's pooler: tanh of a projection of the first token, [B, L, d] -> [B, d]."""
        return jnp.tanh(self.pooler(hidden[:, 0]))


class MLMHead(nn.Module):
    """decoder(norm(gelu(dense(x)))): [..., d_model] -> [..., vocab_size] float32 logits.

    Attributes:
      vocab_size: of the logits.
      norm_eps: of the layer norm.
      dtype: of the matrix products.
    """

    vocab_size: int
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d_model = x.shape[-1]
        x = layers.Dense(d_model, ("embed", "mlp"), dtype=self.dtype, name="dense")(x)
        x = nn.gelu(x, approximate=False)
        x = layers.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        logits = layers.Dense(
            self.vocab_size, ("embed", "vocab"), dtype=self.dtype, name="decoder"
        )(x)
        return logits.astype(jnp.float32)
