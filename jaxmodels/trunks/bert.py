"""BERT, RoBERTa and ELECTRA encoders: post-norm as published, or pre-norm; with their heads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import attention, blocks, embeddings, hooks, layers, stack


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
      embedding_size: width of the embeddings where it is not d_model (ELECTRA-small): a projection
        follows them; None: d_model.
      pooler: has BERT's tanh projection of the first token.
      dropout_rate: hidden dropout.
      attention_dropout_rate: dropout of attention weights.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products.
      layer_hooks: what a method changes, by groups of layers (`core.hooks`).

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
    embedding_size: int | None = None
    pooler: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    remat: str = "none"
    implementation: str | None = None
    dtype: Any = jnp.float32
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}; "
                "choose a divisor of the width."
            )
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be at least 1.")
        if self.embedding_width < 1:
            raise ValueError(f"model.embedding_size={self.embedding_size}: must be at least 1.")

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.d_model if self.embedding_size is None else self.embedding_size

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

    def make_stack(self) -> stack.Stack:
        """Returns the stack of dense layers, with a final norm where the norms are in front."""
        final_norm = "layer" if self.norm_order == "pre" else ""
        return stack.Stack(
            self.make_layer(), self.num_layers, self.layer_hooks, final_norm, remat=self.remat
        )

    def make_embeddings(self, name: str) -> embeddings.TokenEmbeddings:
        """Returns the embedding module of these sizes."""
        return embeddings.TokenEmbeddings(
            vocab_size=self.vocab_size,
            d_model=self.embedding_width,
            position_rows=self.position_rows,
            num_token_types=self.num_token_types,
            position_offset=self.position_offset,
            norm_eps=self.norm_eps,
            dropout_rate=self.dropout_rate,
            name=name,
        )


def _base(**changes: Any) -> BertConfig:
    return BertConfig(dropout_rate=0.1, attention_dropout_rate=0.1, **changes)


def _large(base: BertConfig) -> BertConfig:
    sizes = {"d_model": 1024, "num_layers": 24, "num_heads": 16, "d_ff": 4096}
    return dataclasses.replace(base, **sizes)


_BERT = _base(vocab_size=30522, num_token_types=2, norm_eps=1e-12, position_offset=0, pooler=True)
_ELECTRA = dataclasses.replace(_BERT, pooler=False)
_ROBERTA = _base(pooler=True)

# Pretrained poolers are those of next-sentence prediction; RoBERTa's is untrained, as published.
SIZES: dict[str, BertConfig] = {
    "bert_base": _BERT,
    "bert_large": _large(_BERT),
    "roberta_base": _ROBERTA,
    "roberta_large": _large(_ROBERTA),
    "electra_small": dataclasses.replace(
        _ELECTRA, d_model=256, num_heads=4, d_ff=1024, embedding_size=128
    ),
    "electra_base": _ELECTRA,
    "electra_large": _large(_ELECTRA),
}


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
    bias = attention.key_mask_bias(mask)[:, None, None, :]
    return stack.run_layers(config.make_layer(), params, x, bias, rng, config.remat)


class BertModel(nn.Module):
    """Embeddings and encoder (and pooler) of BERT, RoBERTa or ELECTRA.

    Attributes:
      config: sizes; a checkpoint of any of them loads with `jaxmodels.weights`.
    """

    config: BertConfig

    def setup(self) -> None:
        config = self.config
        self.embeddings = config.make_embeddings("embeddings")
        if config.embedding_width != config.d_model:
            self.embeddings_project = layers.Dense(
                config.d_model, ("mlp", "embed"), dtype=config.dtype
            )
        self.encoder = config.make_stack()
        if config.pooler:
            self.pooler = layers.Dense(config.d_model, ("embed", "mlp"))

    def __call__(
        self,
        input_ids: jax.Array | None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
        *,
        inputs_embeds: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes ids.

        Args:
          input_ids: [batch, length] int; None where `inputs_embeds` are given.
          attention_mask: [batch, length], 1 on real tokens; default all ones.
          token_type_ids: [batch, length] int; default zeros.
          position_ids: [batch, length] int from 0, below max_positions; default 0, 1, 2, ...
          deterministic: no dropout; else an rng named "dropout" is needed.
          inputs_embeds: [batch, length, embedding width], in place of rows of the word table;
            `embeddings.word` makes them from ids.

        Returns:
          [batch, length, d_model] float32.

        Raises:
          ValueError: ids and embeddings, or neither; no position ids, and the input is longer
            than the position table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = jnp.ones(shape, jnp.int32)
        if position_ids is None:
            check_length(shape[1], self.config.max_positions)
            position_ids = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        x = self.embeddings(
            input_ids, position_ids, token_type_ids, deterministic, inputs_embeds=inputs_embeds
        )
        if self.config.embedding_width != self.config.d_model:
            x = self.embeddings_project(x).astype(jnp.float32)
        if self.config.pooler and self.is_initializing():
            self.pool(x)
        bias = attention.key_mask_bias(attention_mask)[:, None, None, :]
        return self.encoder(x, bias, deterministic)

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


class DiscriminatorHead(nn.Module):
    """out_proj(gelu(dense(x))): [..., d_model] -> [...] float32, logits of replaced tokens.

    Attributes:
      dtype: of the matrix products.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d_model = x.shape[-1]
        x = layers.Dense(d_model, ("embed", "mlp"), dtype=self.dtype, name="dense")(x)
        x = nn.gelu(x, approximate=False)
        logits = layers.Dense(1, ("embed", None), dtype=self.dtype, name="out_proj")(x)
        return logits[..., 0].astype(jnp.float32)
