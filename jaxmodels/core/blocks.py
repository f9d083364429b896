"""Transformer layers, and the one way to run a stack of them: a scan over stacked parameters.

The parameters of all layers of a stack are one tree whose leaves have a leading `layers` axis.
Layers of different kinds (dense, local, VCC) that share one parameter tree can then run over
slices of the same stack, and one checkpoint serves every arrangement of kinds; that is why the
scan is written over parameters rather than as a lifted module.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, meta

from jaxmodels.core import attention, layers
from jaxmodels.core.hooks import Hooks
from jaxmodels.core.kv_cache import KVCache
from jaxmodels.core.rotary import Rotary

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


_NORMS = {"layer": layers.LayerNorm, "rms": layers.RMSNorm}


class TransformerLayer(nn.Module):
    """Attention (and cross-attention) and feed-forward with residuals, norm before or after.

    pre:  a = x + attention(norm(x)); y = a + ffn(norm(a))
    post: a = norm(x + attention(x)); y = norm(a + ffn(a))
    The parameter tree is the same for both. Cross-attention, where there is one, stands between.
    A method changes a layer through `hooks`; one that keeps only its parts derives a class.

    Attributes:
      num_heads: attention heads.
      d_model: width of the residual stream.
      d_ff: inner width of the feed-forward.
      norm_order: "pre" or "post".
      norm_eps: of the norms.
      dropout_rate: on the branches while training.
      attention_dropout_rate: on the attention weights while training.
      ffn_dropout_rate: on the inner values of the feed-forward while training.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products; residual stream, norms and softmax stay float32.
      head_dim, num_kv_heads, qkv_bias, scale, rotary: see `attention.MultiHeadAttention`.
      use_bias: the projections have biases.
      norm: "layer" or "rms".
      activation: of the feed-forward, see `layers.ACTIVATIONS`.
      gated: feed-forward with two inner projections.
      cross_attention: attends to a context after itself.
      inits: initialisers by projection name: query, key, value, out, wi, wo; a FrozenDict of
        `layers.normal`, so that equal layers are equal.
      hooks: what a method changes.
    """

    num_heads: int
    d_model: int
    d_ff: int
    norm_order: str = "pre"
    norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    ffn_dropout_rate: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32
    head_dim: int | None = None
    num_kv_heads: int | None = None
    qkv_bias: bool | None = None
    scale: float | None = None
    rotary: Rotary | None = None
    use_bias: bool = True
    norm: str = "layer"
    activation: str = "gelu"
    gated: bool = False
    cross_attention: bool = False
    inits: Mapping[str, layers.Initializer] = FrozenDict()
    hooks: Hooks | None = None

    def setup(self) -> None:
        if self.norm_order not in ("pre", "post"):
            raise ValueError(f"norm_order={self.norm_order!r}: use 'pre' or 'post'.")
        if self.norm not in _NORMS:
            raise ValueError(f"norm={self.norm!r}: use one of {sorted(_NORMS)}.")
        self.attention_norm = self._norm()
        self.attention = self._attention("attention", self.rotary)
        if self.cross_attention:
            self.cross_attention_norm = self._norm()
            self.cross = self._attention("cross_attention", None)
        self.ffn_norm = self._norm()
        normal = layers.normal(0.02)
        self.ffn = layers.FeedForward(
            self.d_ff,
            self.activation,
            self.gated,
            self.use_bias,
            self.ffn_dropout_rate,
            self.dtype,
            self.inits.get("wi", normal),
            self.inits.get("wo", normal),
            self.hooks,
        )
        self.dropout = nn.Dropout(self.dropout_rate)

    def _norm(self) -> nn.Module:
        # A post norm feeds the residual stream and stays float32; a pre norm feeds a product.
        dtype = self.dtype if self.norm_order == "pre" else jnp.float32
        return _NORMS[self.norm](self.norm_eps, dtype)

    def _attention(self, site: str, rotary: Rotary | None) -> attention.MultiHeadAttention:
        return attention.MultiHeadAttention(
            num_heads=self.num_heads,
            d_model=self.d_model,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            use_bias=self.use_bias,
            qkv_bias=self.qkv_bias,
            scale=self.scale,
            rotary=rotary,
            dropout_rate=self.attention_dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
            inits=self.inits,
            hooks=self.hooks,
            site=site,
        )

    def drop(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns a branch after dropout, in float32, ready for the residual stream."""
        return self.dropout(x, deterministic=deterministic).astype(jnp.float32)

    def normalize(self, site: str, x: jax.Array) -> jax.Array:
        """Returns `x` after the norm of the sub-layer `site`, with its hooks."""
        name = f"{site}_norm"
        y = getattr(self, name)(x)
        return y if self.hooks is None else self.hooks.output(name, x, y)

    def branch(
        self,
        site: str,
        run: Callable[[jax.Array], jax.Array],
        x: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """Runs one sub-layer with its norm, dropout, residual and hooks: [B, L, d] -> same shape.

        Args:
          site: "attention", "cross_attention" or "ffn".
          run: the sub-layer itself.
          x: the residual stream.
          deterministic: no dropout.
        """
        norm = functools.partial(self.normalize, site)
        before = norm(x) if self.norm_order == "pre" else x
        y = run(before) if self.hooks is None else self.hooks.sublayer(site, run, before)
        y = self.drop(y, deterministic)
        y = x + y if self.hooks is None else self.hooks.residual(site, x, y, norm)
        return y if self.norm_order == "pre" else norm(y)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        deterministic: bool = True,
        *,
        positions: jax.Array | None = None,
        context: jax.Array | None = None,
        context_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Runs one layer: [B, L, d_model] -> the same shape.

        Args:
          x: the residual stream.
          bias: broadcastable to [B, H, L, L].
          deterministic: no dropout.
          positions: [B or 1, L] int, for rotary embeddings.
          context: [B, K, d_model], what cross-attention reads.
          context_bias: broadcastable to [B, H, L, K].
        """

        def attend(x: jax.Array) -> jax.Array:
            return self.attention(x, bias, None, deterministic, positions)

        def cross(x: jax.Array) -> jax.Array:
            return self.cross(x, context_bias, context, deterministic)

        return self._run(x, attend, cross, deterministic)

    def decode(
        self,
        x: jax.Array,
        cache: KVCache,
        bias: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        context: KVCache | None = None,
        context_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs one layer on the next tokens: [N, T, d_model] -> the same shape, and the cache.

        Args:
          x: the residual stream of the next T tokens.
          cache: of the tokens before.
          bias: broadcastable to [N, H, T, max_length], beside the causal one.
          positions: [N or 1, T] int, for rotary embeddings; default those behind the cache.
          context: keys and values of what cross-attention reads, from `context_cache`.
          context_bias: broadcastable to [B, 1, 1, K].
        """
        grown = cache

        def attend(x: jax.Array) -> jax.Array:
            nonlocal grown
            y, grown = self.attention.decode(x, cache, bias, positions)
            return y

        def cross(x: jax.Array) -> jax.Array:
            return self.cross.attend_cached(self.cross.queries(x), context, context_bias)

        return self._run(x, attend, cross), grown

    def prefill(
        self,
        x: jax.Array,
        max_length: int,
        bias: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs one layer on a whole prompt: [B, P, d_model] -> the same shape, and its cache.

        Args:
          x: the residual stream.
          max_length: places of the cache, P or more.
          bias: broadcastable to [B, H, P, P], with the causal one in it.
          positions: [B or 1, P] int, for rotary embeddings.

        Raises:
          ValueError: a layer with cross-attention, whose prompt of a token or a few `decode` runs.
        """
        if self.cross_attention:
            raise ValueError("prefill has no cross-attention; run the first tokens by decode.")
        made: list[KVCache] = []

        def attend(x: jax.Array) -> jax.Array:
            y, cache = self.attention.prefill(x, max_length, bias, positions)
            made.append(cache)
            return y

        return self._run(x, attend, attend), made[0]

    def context_cache(self, context: jax.Array) -> KVCache:
        """Returns the keys and values of a context [B, K, d_model], made once a generation."""
        return KVCache.full(self.cross.keys(context), self.cross.values(context))

    def _run(
        self,
        x: jax.Array,
        attend: Callable[[jax.Array], jax.Array],
        cross: Callable[[jax.Array], jax.Array],
        deterministic: bool = True,
    ) -> jax.Array:
        if self.hooks is not None:
            x = self.hooks.enter(self, x)
        x = self.branch("attention", attend, x, deterministic)
        if self.cross_attention:
            x = self.branch("cross_attention", cross, x, deterministic)

        def feed_forward(x: jax.Array) -> jax.Array:
            return self.ffn(x, deterministic)

        return self.branch("ffn", feed_forward, x, deterministic)


def stacked_init(layer: nn.Module, num_layers: int, d_model: int) -> Callable[[jax.Array], Any]:
    """Returns rng -> boxed parameters of `num_layers` layers, stacked on a leading axis."""

    def one(rng: jax.Array) -> Any:
        x = jnp.zeros((1, 1, d_model), jnp.float32)
        context = {"context": x} if getattr(layer, "cross_attention", False) else {}
        return layer.init(rng, x, **context)["params"]

    def init(rng: jax.Array) -> Any:
        stacked = jax.vmap(one)(jax.random.split(rng, num_layers))
        return meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})

    return init


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Returns `function` with its backward pass recomputing what the named policy drops.

    Raises:
      ValueError: unknown policy.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat={policy!r}: use one of {sorted(REMAT_POLICIES)}.")
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=False)


def scan_layers(
    body: Callable[[Any, Any, jax.Array | None], tuple[Any, Any]],
    params: Any,
    carry: Any,
    rng: jax.Array | None = None,
    policy: str = "none",
) -> tuple[Any, Any]:
    """Runs a stack of layers; compile time does not grow with depth.

    Args:
      body: (layer parameters, carry, layer rng or None) -> (carry, outputs).
      params: parameters stacked on a leading layer axis, or a slice of them.
      carry: what the layers pass on.
      rng: split over the layers; None where nothing is random.
      policy: remat policy by name (`REMAT_POLICIES`).

    Returns:
      (carry after the last layer, outputs stacked on a leading layer axis).
    """
    depth = jax.tree.leaves(params)[0].shape[0]
    rngs = None if rng is None else jax.random.split(rng, depth)
    step = remat(body, policy)

    def scanned(state: Any, xs: Any) -> tuple[Any, Any]:
        return step(xs[0], state, xs[1])

    return jax.lax.scan(scanned, carry, (params, rngs))


def layer_slice(params: Any, start: int, stop: int) -> Any:
    """Returns the parameters of layers start..stop-1 of a stack."""
    return jax.tree.map(lambda leaf: leaf[start:stop], params)
