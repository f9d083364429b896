"""Multi-head attention: one function over heads, one module with its four projections.

Array axes: B batch, Q queries, K keys, H heads, D head width.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from jaxmodels.core import layers
from jaxmodels.core.hooks import Hooks
from jaxmodels.core.kv_cache import KVCache, cached_attention
from jaxmodels.core.rotary import Rotary

HIDDEN = -1e9  # as good as minus infinity, and finite
MASK_BIAS = -1000.0  # finite, so that a row with every key masked stays free of NaN
IMPLEMENTATIONS = (None, "xla", "chunked", "cudnn")
# Chunked attention: (queries from which it is chosen, queries a step). On a CPU small steps keep
# the weights in cache and win early; accelerators want larger products.
CHUNKING = {"cpu": (512, 64)}
CHUNKING_ELSEWHERE = (2048, 512)


def key_mask_bias(mask: jax.Array, value: float = MASK_BIAS) -> jax.Array:
    """Returns a bias a key, [B, K] float32: 0 where `mask` is 1 and `value` where it is 0."""
    return value * (1.0 - mask.astype(jnp.float32))


def hidden_keys_bias(mask: jax.Array) -> jax.Array:
    """Returns [B, 1, 1, K] float32: 0 where `mask` [B, K] is 1, as good as -inf elsewhere."""
    return key_mask_bias(mask, HIDDEN)[:, None, None, :]


def causal_bias(num_queries: int, num_keys: int, offset: jax.Array | int = 0) -> jax.Array:
    """Returns [1, 1, Q, K] float32: 0 where key <= query + offset, a large negative elsewhere."""
    query = jnp.arange(num_queries)[:, None] + offset
    allowed = jnp.arange(num_keys)[None, :] <= query
    return jnp.where(allowed, 0.0, HIDDEN).astype(jnp.float32)[None, None]


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


class MultiHeadAttention(nn.Module):
    """The four projections of attention, and attention between them.

    Methods take and return [B, L, d_model]; `queries`, `keys`, `values` return [B, L, H, D], so
    that a method can score or cache them before `attend`. G = num_kv_heads stands for H in keys
    and values where several query heads share one of them (grouped-query attention).

    Attributes:
      num_heads: H.
      d_model: width of input and output.
      head_dim: D; default d_model / num_heads.
      num_kv_heads: G, a divisor of H; default H.
      use_bias: the projections have biases.
      qkv_bias: those of queries, keys and values; default `use_bias`.
      scale: of the scores; default head_dim ** -0.5 (T5: 1.0).
      rotary: turns queries and keys by their positions.
      dropout_rate: on the attention weights while training.
      implementation: see `dot_product_attention`.
      dtype: of the matrix products.
      inits: initialisers by projection name; default normal(0.02).
      hooks: called at "<site>.query" and so on, and for keys and values at `site`.
      site: "attention" or "cross_attention".
    """

    num_heads: int
    d_model: int
    head_dim: int | None = None
    num_kv_heads: int | None = None
    use_bias: bool = True
    qkv_bias: bool | None = None
    scale: float | None = None
    rotary: Rotary | None = None
    dropout_rate: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32
    inits: Mapping[str, layers.Initializer] = FrozenDict()
    hooks: Hooks | None = None
    site: str = "attention"

    def setup(self) -> None:
        self.width = _head_width(self.num_heads, self.d_model, self.head_dim)
        self.kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}; "
                "choose a divisor."
            )
        normal = layers.normal(0.02)
        qkv_bias = self.use_bias if self.qkv_bias is None else self.qkv_bias

        def dense(name: str, features: int, axes: tuple[str, str], bias: bool) -> layers.Dense:
            init = self.inits.get(name, normal)
            return layers.Dense(features, axes, bias, self.dtype, init)

        inner, shared = self.num_heads * self.width, self.kv_heads * self.width
        self.query = dense("query", inner, ("embed", "heads"), qkv_bias)
        self.key = dense("key", shared, ("embed", "heads"), qkv_bias)
        self.value = dense("value", shared, ("embed", "heads"), qkv_bias)
        self.out = dense("out", self.d_model, ("heads", "embed"), self.use_bias)
        self.dropout = nn.Dropout(self.dropout_rate)

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        y = getattr(self, name)(x)
        return y if self.hooks is None else self.hooks.output(f"{self.site}.{name}", x, y)

    def _heads(self, name: str, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        y = self._project(name, x).reshape(*x.shape[:-1], -1, self.width)
        if self.rotary is None or name == "value":
            return y
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        return self.rotary.rotate(y, positions)

    def queries(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Returns the queries, already scaled: [B, L, d_model] -> [B, L, H, D].

        Args:
          x: input.
          positions: [B or 1, L] int, for rotary embeddings alone; default 0, 1, 2, ...
        """
        scale = self.width**-0.5 if self.scale is None else self.scale
        return self._heads("query", x, positions) * jnp.asarray(scale, self.dtype)

    def keys(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Returns the keys: [B, L, d_model] -> [B, L, G, D]; `positions` as for `queries`."""
        return self._heads("key", x, positions)

    def values(self, x: jax.Array) -> jax.Array:
        """Returns the values: [B, L, d_model] -> [B, L, G, D]."""
        return self._heads("value", x, None)

    def project_out(self, mixed: jax.Array) -> jax.Array:
        """Joins the heads of mixed values and projects them: [B, Q, H, D] -> [B, Q, d_model]."""
        return self._project("out", mixed.reshape(*mixed.shape[:2], -1))

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Mixes the values and projects them out: heads [B, L, H, D] -> [B, Q, d_model]."""
        if self.hooks is not None:
            key, value, bias = self.hooks.keys_values(self.site, key, value, bias)
        if key.shape[2] != query.shape[2]:
            shares = query.shape[2] // key.shape[2]
            key, value = jnp.repeat(key, shares, axis=2), jnp.repeat(value, shares, axis=2)
        drop = None
        if self.dropout_rate and not deterministic:
            drop = functools.partial(self.dropout, deterministic=False)
        mixed = dot_product_attention(
            query, key, value, bias, dropout=drop, implementation=self.implementation
        )
        return self.project_out(mixed)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        context: jax.Array | None = None,
        deterministic: bool = True,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from `x` [B, Q, d_model] to `context` [B, K, d_model] (default `x` itself)."""
        context = x if context is None else context
        query, key = self.queries(x, positions), self.keys(context, positions)
        return self.attend(query, key, self.values(context), bias, deterministic)

    def decode(
        self,
        x: jax.Array,
        cache: KVCache,
        bias: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Attends causally from new tokens to all in the cache.

        Args:
          x: [B, T, d_model], the next T tokens.
          cache: what came before.
          bias: more bias, broadcastable to [B, H, T, max_length].
          positions: [B or 1, T] int, for rotary embeddings; default those behind the cache.

        Returns:
          [B, T, d_model] and the cache with the new tokens in it.
        """
        if positions is None:
            positions = cache.length + jnp.arange(x.shape[1])[None]
        cache = cache.append(self.keys(x, positions), self.values(x))
        causal = causal_bias(x.shape[1], cache.max_length, cache.length - x.shape[1])
        bias = causal if bias is None else causal + bias
        return self.attend_cached(self.queries(x, positions), cache, bias), cache

    def prefill(
        self,
        x: jax.Array,
        max_length: int,
        bias: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Attends among the first tokens of a sequence as a whole, and keeps their keys and values.

        Equals `decode` from an empty cache, without attention to places that are still empty, and
        with the fused or chunked attention of `__call__`.

        Args:
          x: [B, P, d_model].
          max_length: places of the cache.
          bias: broadcastable to [B, H, P, P]; the causal one has to be in it.
          positions: as for `queries`.

        Returns:
          [B, P, d_model] and the cache of P tokens.
        """
        key, value = self.keys(x, positions), self.values(x)
        shape = (x.shape[0], self.kv_heads, max_length, self.width)
        cache = KVCache.empty(shape, self.dtype).append(key, value)
        return self.attend(self.queries(x, positions), key, value, bias), cache

    def attend_cached(
        self, query: jax.Array, cache: KVCache, bias: jax.Array | None = None
    ) -> jax.Array:
        """Attends to a cache as it is: query [N, Q, H, D] -> [N, Q, d_model].

        N may be a multiple of the cache's rows B (beams over one encoder output): rows
        i N/B ... (i + 1) N/B - 1 read row i.

        Args:
          query: scaled queries.
          cache: keys and values.
          bias: broadcastable to [N, H, Q, max_length] ([B, 1, 1, max_length] where N > B).
        """
        key, value = cache.key, cache.value
        if self.hooks is not None:
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
            key, value, bias = self.hooks.keys_values(self.site, key, value, bias)
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mixed = cached_attention(query, key, value, bias)
        return self.project_out(mixed)


def _head_width(num_heads: int, d_model: int, head_dim: int | None) -> int:
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide d_model={d_model}; "
            "choose a divisor or set head_dim."
        )
    return head_dim or d_model // num_heads
