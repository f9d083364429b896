"""Weighted attention on TPU: tokens in order of position, and the Mosaic kernels' gradients.

For both kinds of bias: one that is only a key's would also fit into a 65th feature of a published
flash kernel, but rounded to bfloat16 and at twice the width where heads are 128 wide.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.weighted_attention import tpu_backward, tpu_forward
from kernels_pallas.weighted_attention.relative import RelativeBias
from kernels_pallas.weighted_attention.tiles import (
    LANES,
    TILE,
    Layout,
    Plan,
    cut,
    heads_first,
    make_layout,
    make_plan,
)


def weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None = None,
    *,
    tile: int = TILE,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.weighted_attention`, for a bias [B, r] that is `reference.shifted`.

    Args:
      query: [B, r, h, dh].
      key: as `query`.
      value: as `query`.
      key_bias: [B, r] float32.
      relative: T5's relative bias, of at most 128 buckets.
      tile: tokens a tile, a multiple of 128.
      interpret: run the kernels in Python.

    Raises:
      ValueError: more buckets than lanes.
    """
    if relative is not None and relative.num_buckets > LANES:
        raise ValueError(
            f"{relative.num_buckets} buckets: the TPU kernel looks them up among {LANES} lanes; "
            "use implementation='chunked'."
        )
    plan = make_plan(query, relative, tile, interpret)
    order = None
    if relative is not None and not relative.ordered:
        order = jnp.argsort(relative.positions, axis=1, stable=False)  # quicker to compile
    return _attention(plan, query, key, value, key_bias, relative, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: Plan,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None,
    order: jax.Array | None,
) -> jax.Array:
    return _attention_forward(plan, query, key, value, key_bias, relative, order)[0]


def _attention_forward(plan: Plan, query, key, value, key_bias, relative, order):
    heads = [heads_first(_sort(x, order), plan) for x in (query, key, value)]
    layout = _sorted_layout(plan, key_bias, relative, order)
    out, lse = tpu_forward.forward(*heads, layout, plan)
    out = _unsort(out[:, :, : query.shape[1]].swapaxes(1, 2), order)
    return out, (query, key, value, key_bias, relative, order, out, lse)


def _attention_backward(plan: Plan, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    query, key, value, key_bias, relative, order, out, lse = saved
    length = query.shape[1]
    delta = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(axis=-1)
    delta = cut(_sort(delta, order).swapaxes(1, 2), plan)
    g = g.astype(value.dtype)
    heads = [heads_first(_sort(x, order), plan) for x in (query, key, value, g)]
    layout = _sorted_layout(plan, key_bias, relative, order)
    dq = tpu_backward.query_gradient(heads, (lse, delta), layout, plan)
    dk, dv, dbias, dtable = tpu_backward.key_gradients(heads, (lse, delta), layout, plan)
    dq, dk, dv = (_unsort(x[:, :, :length].swapaxes(1, 2), order) for x in (dq, dk, dv))
    dbias = dbias.sum(axis=1).reshape(key_bias.shape[0], -1)[:, :length]
    drelative = None
    if relative is not None:
        table = dtable.sum(axis=(0, 3)).T.astype(relative.table.dtype)
        drelative = RelativeBias(
            _no_gradient(relative.positions), table, relative.max_distance, relative.ordered
        )
    return dq, dk, dv, _unsort(dbias, order), drelative, _no_gradient(order)


_attention.defvjp(_attention_forward, _attention_backward)


def _sorted_layout(
    plan: Plan, key_bias: jax.Array, relative: RelativeBias | None, order: jax.Array | None
) -> Layout:
    if relative is not None:
        positions = _sort(relative.positions, order)
        relative = RelativeBias(positions, relative.table, relative.max_distance)
    return make_layout(_sort(key_bias, order), relative, plan)


def _sort(x: jax.Array, order: jax.Array | None) -> jax.Array:
    """Rows of x [B, r, ...] in this order."""
    return x if order is None else jax.vmap(lambda row, index: row[index])(x, order)


def _unsort(x: jax.Array, order: jax.Array | None) -> jax.Array:
    if order is None:
        return x
    places = jnp.broadcast_to(jnp.arange(order.shape[1], dtype=order.dtype), order.shape)

    def inverse(order: jax.Array, places: jax.Array) -> jax.Array:  # no sort: slow to compile
        places_of = jnp.zeros_like(places).at[order]
        return places_of.set(places, mode="promise_in_bounds", unique_indices=True)

    return _sort(x, jax.vmap(inverse)(order, places))


def _no_gradient(x: jax.Array | None) -> np.ndarray | None:
    return None if x is None else np.zeros(x.shape, jax.dtypes.float0)
