"""Balance and z losses of routers, from sums that every device makes of its own rows (section 6).

The sums are additive, so that micro-batches and chunks add up; the losses are taken of them
outside the exchange, over all devices at once.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.smile.routing import Route, counts


@struct.dataclass
class RouterSums:
    """Sums over the valid rows that one router saw on one device.

    Attributes:
      rows: [] float32, how many.
      chosen: [K] float32, rows by their intended choice, before any drop; without gradient.
      probs: [K] float32, summed probabilities.
      z: [] float32, summed squares of logsumexp(logits).
      kept: [] float32, rows that found a slot.
    """

    rows: jax.Array
    chosen: jax.Array
    probs: jax.Array
    z: jax.Array
    kept: jax.Array


def router_sums(routed: Route, kept: jax.Array) -> RouterSums:
    """Returns the sums of one router on one device; rows that are not valid count nothing."""
    valid = routed.valid
    dtype = routed.probs.dtype
    chosen = counts(routed.index, valid, routed.probs.shape[-1])
    z = jnp.square(jax.nn.logsumexp(routed.logits, axis=-1))
    return RouterSums(
        rows=valid.sum().astype(dtype),
        chosen=jax.lax.stop_gradient(chosen.astype(dtype)),
        probs=jnp.where(valid[:, None], routed.probs, 0).sum(0),
        z=jnp.where(valid, z, 0).sum(),
        kept=kept.sum().astype(dtype),
    )


def balance(sums: RouterSums) -> jax.Array:
    """K * sum_k f_k P_k of each set of rows: 1 when even, K when all choose one; 0 without rows.

    Args:
      sums: with any leading axes.

    Returns:
      their leading axes.
    """
    rows = jnp.maximum(sums.rows, 1)
    buckets = sums.chosen.shape[-1]
    return buckets * (sums.chosen * sums.probs).sum(-1) / jnp.square(rows)


def balance_loss(sums: RouterSums, stats: str = "device") -> jax.Array:
    """Returns the balance loss over devices, float32 [].

    Args:
      sums: leading axes run over devices.
      stats: "device": mean of the devices' balances weighted by their rows (an empty device then
        neither lowers nor raises it); "device_mean": their plain mean; "global": the balance of
        all rows together.

    Raises:
      ValueError: other stats.
    """
    if stats == "global":
        return balance(total(sums))
    each = balance(sums)
    if stats == "device_mean":
        return each.mean()
    if stats != "device":
        raise ValueError(f"stats={stats!r}: use 'device', 'device_mean' or 'global'.")
    return (each * sums.rows).sum() / jnp.maximum(sums.rows.sum(), 1)


def z_loss(sums: RouterSums) -> jax.Array:
    """Returns the mean over all rows of logsumexp(logits)^2 (arXiv:2202.08906), float32 []."""
    return sums.z.sum() / jnp.maximum(sums.rows.sum(), 1)


def total(sums: RouterSums) -> RouterSums:
    """Returns the sums over all devices together."""
    buckets = sums.chosen.shape[-1]
    return RouterSums(
        rows=sums.rows.sum(),
        chosen=sums.chosen.reshape(-1, buckets).sum(0),
        probs=sums.probs.reshape(-1, buckets).sum(0),
        z=sums.z.sum(),
        kept=sums.kept.sum(),
    )
