"""Transformer layers, and the one way to run a stack of them: a scan over stacked parameters.

The parameters of all layers of a stack are one tree whose leaves have a leading `layers` axis.
Layers of different kinds (dense, local, VCC) that share one parameter tree can then run over
slices of the same stack, and one checkpoint serves every arrangement of kinds; that is why the
scan is written over parameters rather than as a lifted module.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jaxmodels.core import attention, layers

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward with residuals, norm before (pre) or after (post).

    pre:  a = x + attention(norm(x)); y = a + ffn(norm(a))
    post: a = norm(x + attention(x)); y = norm(a + ffn(a))
    The parameter tree is the same for both.

    Attributes:
      num_heads: attention heads.
      d_model: width of the residual stream.
      d_ff: inner width of the feed-forward.
      norm_order: "pre" or "post".
      norm_eps: of the layer norms.
      dropout_rate: on both branches while training.
      attention_dropout_rate: on the attention weights while training.
      implementation: see `attention.dot_product_attention`.
      dtype: of the matrix products; residual stream, norms and softmax stay float32.
    """

    num_heads: int
    d_model: int
    d_ff: int
    norm_order: str = "pre"
    norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.norm_order not in ("pre", "post"):
            raise ValueError(f"norm_order={self.norm_order!r}: use 'pre' or 'post'.")
        # A post norm feeds the residual stream and stays float32; a pre norm feeds a product.
        norm_dtype = self.dtype if self.norm_order == "pre" else jnp.float32
        self.attention_norm = layers.LayerNorm(self.norm_eps, norm_dtype)
        self.attention = attention.MultiHeadAttention(
            num_heads=self.num_heads,
            d_model=self.d_model,
            dropout_rate=self.attention_dropout_rate,
            implementation=self.implementation,
            dtype=self.dtype,
        )
        self.ffn_norm = layers.LayerNorm(self.norm_eps, norm_dtype)
        self.ffn = layers.FeedForward(self.d_ff, dtype=self.dtype)
        self.dropout = nn.Dropout(self.dropout_rate)

    def drop(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns a branch after dropout, in float32, ready for the residual stream."""
        return self.dropout(x, deterministic=deterministic).astype(jnp.float32)

    def __call__(
        self, x: jax.Array, bias: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Runs one layer: x [B, L, d_model], bias broadcastable to [B, H, L, L] -> same shape."""
        if self.norm_order == "pre":
            mixed = self.attention(self.attention_norm(x), bias, deterministic=deterministic)
            x = x + self.drop(mixed, deterministic)
            return x + self.drop(self.ffn(self.ffn_norm(x)), deterministic)
        mixed = self.attention(x, bias, deterministic=deterministic)
        x = self.attention_norm(x + self.drop(mixed, deterministic))
        return self.ffn_norm(x + self.drop(self.ffn(x), deterministic))


def stacked_init(layer: nn.Module, num_layers: int, d_model: int) -> Callable[[jax.Array], Any]:
    """Returns rng -> boxed parameters of `num_layers` layers, stacked on a leading axis."""

    def one(rng: jax.Array) -> Any:
        return layer.init(rng, jnp.zeros((1, 1, d_model), jnp.float32))["params"]

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
