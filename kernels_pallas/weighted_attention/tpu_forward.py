"""The Mosaic kernel of the forward pass: attention with an online softmax in float32."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.weighted_attention import tpu_grid
from kernels_pallas.weighted_attention.tiles import LANES, Layout, Plan
from kernels_pallas.weighted_attention.tpu_grid import dot, rows

LOWEST = -3e38  # where the running maximum starts


def attention_forward(refs: SimpleNamespace, plan: Plan) -> None:
    """One query tile over the resident key tiles; the running sums live in scratch."""

    @pl.when(pl.program_id(3) == 0)
    def start() -> None:
        refs.top[...] = jnp.full_like(refs.top, LOWEST)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.mixed[...] = jnp.zeros_like(refs.mixed)

    def add(j: jax.Array, bias: jax.Array) -> None:
        scores = dot(refs.query[...], rows(refs.key, j, plan), (1, 1)) + bias
        old = refs.top[...]
        top = jnp.maximum(old, scores.max(axis=1, keepdims=True))
        shrink = jnp.exp(old - top)
        weights = jnp.exp(scores - top[:, :1])
        refs.top[...] = top
        refs.total[...] = refs.total[...] * shrink + weights.sum(axis=1, keepdims=True)
        mixed = dot(weights.astype(refs.value.dtype), rows(refs.value, j, plan), (1, 0))
        refs.mixed[...] = refs.mixed[...] * shrink[:, :1] + mixed

    tpu_grid.walk(refs, plan, *tpu_grid.over_keys(refs, plan, add))

    @pl.when(pl.program_id(3) == plan.chunks - 1)
    def finish() -> None:
        refs.out[...] = (refs.mixed[...] / refs.total[:, :1]).astype(refs.out.dtype)
        refs.lse[...] = tpu_grid.row(refs.top[:, :1] + jnp.log(refs.total[:, :1]))


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, layout: Layout, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed values [B, h, R, dh] and log-sum-exp of the scores [B, h, N, 1, T].

    Args:
      query: [B, h, R, dh], as are `key` and `value`.
      key: see `query`.
      value: see `query`.
      layout: biases and positions.
      plan: sizes.
    """
    inputs = {
        "query": ("own", query),
        "key": ("other", key),
        "value": ("other", value),
        "bias": ("other_rows", layout.bias),
        **tpu_grid.bias_inputs(layout),
    }
    outputs = {
        "out": ("own", jax.ShapeDtypeStruct(value.shape, value.dtype)),
        "lse": ("own_head", tpu_grid.per_token(plan, query.shape[0])),
    }
    scratch = {
        "top": (plan.tile, LANES),
        "total": (plan.tile, LANES),
        "mixed": (plan.tile, plan.width),
    }
    scalars = {"near": layout.near, "far": layout.far}
    out, lse = tpu_grid.call(attention_forward, plan, scalars, inputs, outputs, scratch)
    return out, lse
