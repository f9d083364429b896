"""Multi-head attention: one function over heads, one module with its four projections.

Array axes: B batch, Q queries, K keys, H heads, D head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxmodels.core import layers

MASK_BIAS = -1000.0  # finite, so that a row with every key masked stays free of NaN
IMPLEMENTATIONS = (None, "xla", "chunked", "cudnn")
# Chunked attention: (queries from which it is chosen, queries a step). On a CPU small steps keep
# the weights in cache and win early; accelerators want larger products.
CHUNKING = {"cpu": (512, 64)}
CHUNKING_ELSEWHERE = (2048, 512)


def key_mask_bias(mask: jax.Array, value: float = MASK_BIAS) -> jax.Array:
    """Returns a bias a key, [B, K] float32: 0 where `mask` is 1 and `value` where it is 0."""
    return value * (1.0 - mask.astype(jnp.float32))


def causal_bias(num_queries: int, num_keys: int, offset: jax.Array | int = 0) -> jax.Array:
    """Returns [1, 1, Q, K] float32: 0 where key <= query + offset, a large negative elsewhere."""
    query = jnp.arange(num_queries)[:, None] + offset
    allowed = jnp.arange(num_keys)[None, :] <= query
    return jnp.where(allowed, 0.0, -1e9).astype(jnp.float32)[None, None]


def attention_weights(
    query: jax.Array, key: jax.Array, bias: jax.Array | None = None, scale: float = 1.0
) -> jax.Array:
    """Returns softmax over keys, in float32: [B, Q, H, D] x [B, K, H, D] -> [B, H, Q, K]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    return jax.nn.softmax(scores, axis=-1)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float = 1.0,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over heads with an additive bias.

    Args:
      query: [B, Q, H, D].
      key: [B, K, H, D].
      value: [B, K, H, D].
      bias: None, or broadcastable to [B, H, Q, K], float32; masks and weights come in here.
      scale: multiplies the queries.
      dropout: applied to the attention weights; only the plain implementation has them.
      implementation: "xla" (plain), "chunked" (queries in blocks, weights recomputed in the
        backward pass: memory linear in K), "cudnn" (fused, GPU) or None: cudnn on GPU in half
        precision, chunked for long inputs (`CHUNKING`), xla else.

    Returns:
      [B, Q, H, D] in the dtype of `value`.

    Raises:
      ValueError: unknown implementation, or one without dropout asked to drop.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: use {IMPLEMENTATIONS}.")
    if dropout is not None and implementation in ("chunked", "cudnn"):
        raise ValueError(f"{implementation!r} attention has no dropout of its weights; use 'xla'.")
    if implementation is None:
        implementation = _choose(query, dropout)
    if implementation == "cudnn":
        if bias is not None:  # cuDNN takes no bias a key: a row a query, in the products' type
            rows = (*bias.shape[:2], query.shape[1], key.shape[1])
            bias = jnp.broadcast_to(bias, rows).astype(query.dtype)
        return jax.nn.dot_product_attention(
            query, key, value, bias=bias, scale=scale, implementation="cudnn"
        )
    if implementation == "chunked":
        return _chunked(query, key, value, bias, scale)
    weights = attention_weights(query, key, bias, scale)
    if dropout is not None:
        weights = dropout(weights)
    return _mix(weights, value)


def platform() -> str:
    """Returns the platform that is traced for: the mesh's in scope, else jax's default backend.

    The two differ where a program is compiled for hardware that is not attached.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _choose(query: jax.Array, dropout: Callable[[jax.Array], jax.Array] | None) -> str:
    if dropout is not None:
        return "xla"
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if half and platform() == "gpu":
        return "cudnn"
    return "chunked" if query.shape[1] >= chunking()[0] else "xla"


def chunking() -> tuple[int, int]:
    """Returns (queries from which attention is chunked, queries a step) on this platform."""
    return CHUNKING.get(platform(), CHUNKING_ELSEWHERE)


def _mix(weights: jax.Array, value: jax.Array) -> jax.Array:
    mixed = jnp.einsum(
        "bhqk,bkhd->bqhd",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return mixed.astype(value.dtype)


def _chunked(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, scale: float
) -> jax.Array:
    """Plain attention for a chunk of queries at a time; [H, chunk, K] weights live at once."""
    batch, num_queries, heads, width = query.shape
    size = chunking()[1]
    pad = -num_queries % size
    query = jnp.pad(query, ((0, 0), (0, pad), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(query.reshape(batch, -1, size, heads, width), 1, 0)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    rows = None
    if bias is not None and bias.shape[2] != 1:  # a bias that differs by query is cut as well
        rows = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0)))
        rows = rows.reshape(*bias.shape[:2], -1, size, bias.shape[3])
        rows = jnp.moveaxis(rows, 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(chunk: jax.Array, row: jax.Array | None) -> jax.Array:
        scores = jnp.einsum(
            "bqhd,bhkd->bhqk", chunk * scale, key, preferred_element_type=jnp.float32
        )
        row = bias if row is None else row
        scores = scores if row is None else scores + row
        # Dividing the mixed values instead of the weights saves passes over [Q, K].
        top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        mixed = jnp.einsum(
            "bhqk,bhkd->bhqd",
            weights.astype(value.dtype),
            value,
            preferred_element_type=jnp.float32,
        )
        mixed = mixed / weights.sum(axis=-1, keepdims=True)
        return mixed.transpose(0, 2, 1, 3).astype(value.dtype)

    _, mixed = jax.lax.scan(lambda _, x: (None, step(*x)), None, (chunks, rows))
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(batch, -1, heads, width)
    return mixed[:, :num_queries]


@struct.dataclass
class KVCache:
    """Keys and values of the tokens decoded so far, in static shapes.

    Attributes:
      key: [B, max_length, H, D].
      value: [B, max_length, H, D].
      length: scalar int32, tokens held.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: Any = jnp.float32) -> "KVCache":
        """Returns a cache of `shape` [B, max_length, H, D] that holds nothing."""
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.zeros((), jnp.int32))

    def append(self, key: jax.Array, value: jax.Array) -> "KVCache":
        """Returns the cache with `key` and `value` [B, T, H, D] written after what it holds."""
        start = (0, self.length, 0, 0)
        return KVCache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), start),
            self.length + key.shape[1],
        )

    def bias(self, num_queries: int) -> jax.Array:
        """Causal bias [1, 1, T, max_length] for the last `num_queries` tokens of the cache."""
        return causal_bias(num_queries, self.key.shape[1], self.length - num_queries)


class MultiHeadAttention(nn.Module):
    """The four projections of attention, and attention between them.

    Methods take and return [B, L, d_model]; `queries`, `keys`, `values` return [B, L, H, D], so
    that a method can score or cache them before `attend`.

    Attributes:
      num_heads: H.
      head_dim: D; default d_model / num_heads.
      use_bias: the projections have biases.
      scale: of the scores; default head_dim ** -0.5 (T5: 1.0).
      dropout_rate: on the attention weights while training.
      implementation: see `dot_product_attention`.
      dtype: of the matrix products.
      kernel_init: of the projections.
    """

    num_heads: int
    d_model: int
    head_dim: int | None = None
    use_bias: bool = True
    scale: float | None = None
    dropout_rate: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32
    kernel_init: layers.Initializer = nn.initializers.normal(0.02)

    def setup(self) -> None:
        width = self.head_dim or self.d_model // self.num_heads
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                "choose a divisor or set head_dim."
            )
        self.width = width

        def dense(features: int, axes: tuple[str, str]) -> layers.Dense:
            return layers.Dense(features, axes, self.use_bias, self.dtype, self.kernel_init)

        self.query = dense(self.num_heads * width, ("embed", "heads"))
        self.key = dense(self.num_heads * width, ("embed", "heads"))
        self.value = dense(self.num_heads * width, ("embed", "heads"))
        self.out = dense(self.d_model, ("heads", "embed"))
        self.dropout = nn.Dropout(self.dropout_rate)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, self.width)

    def queries(self, x: jax.Array) -> jax.Array:
        """Returns the queries, already scaled: [B, L, d_model] -> [B, L, H, D]."""
        scale = self.width**-0.5 if self.scale is None else self.scale
        return self._heads(self.query(x)) * jnp.asarray(scale, self.dtype)

    def keys(self, x: jax.Array) -> jax.Array:
        """Returns the keys: [B, L, d_model] -> [B, L, H, D]."""
        return self._heads(self.key(x))

    def values(self, x: jax.Array) -> jax.Array:
        """Returns the values: [B, L, d_model] -> [B, L, H, D]."""
        return self._heads(self.value(x))

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Mixes the values and projects them out: heads [B, L, H, D] -> [B, Q, d_model]."""
        drop = None
        if self.dropout_rate and not deterministic:
            drop = functools.partial(self.dropout, deterministic=False)
        mixed = dot_product_attention(
            query, key, value, bias, dropout=drop, implementation=self.implementation
        )
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        context: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attends from `x` [B, Q, d_model] to `context` [B, K, d_model] (default `x` itself)."""
        context = x if context is None else context
        query, key, value = self.queries(x), self.keys(context), self.values(context)
        return self.attend(query, key, value, bias, deterministic)

    def decode(
        self, x: jax.Array, cache: KVCache, bias: jax.Array | float = 0.0
    ) -> tuple[jax.Array, KVCache]:
        """Attends causally from new tokens to all in the cache.

        Args:
          x: [B, T, d_model], the next T tokens.
          cache: what came before.
          bias: more bias, broadcastable to [B, H, T, max_length].

        Returns:
          [B, T, d_model] and the cache with the new tokens in it.
        """
        cache = cache.append(self.keys(x), self.values(x))
        causal = cache.bias(x.shape[1]) + bias
        return self.attend(self.queries(x), cache.key, cache.value, causal), cache
