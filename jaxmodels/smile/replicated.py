"""The layer for fewer tokens than devices (decoding): every device sees all, computes its own part.

No row travels: each cell runs its experts on all tokens, keeps those that chose them, and the
results are summed over the grid. Nothing is dropped.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.smile import experts, losses, routing
from jaxmodels.smile.grid import Placement
from jaxmodels.smile.settings import MoeConfig

Array = jax.Array


def run(
    where: Placement,
    repeated: Mapping[str, Array],
    weights: experts.Weights,
    options: MoeConfig,
) -> tuple[Array, dict[str, losses.RouterSums], Array]:
    """Returns this cell's share of y [T, d] float32, the sums, and its experts' rows [e].

    Args:
      where: of the cell.
      repeated: `x` [T, d], `mask` [T], and the routers by name.
      weights: of the cell's experts.
      options: of the layer.
    """
    x, mask, e = repeated["x"], repeated["mask"], options.experts_per_device
    index, gate, levels = _choices(repeated, options)
    mine = where.cell_index() * e + jnp.arange(e)[:, None]  # [e, 1]
    chosen = (index == mine) & mask  # [e, T]
    out = experts.blocks(weights, jnp.broadcast_to(x, (e, *x.shape)), options.activation)
    y = jnp.where(chosen[:, :, None], gate[:, None] * out.astype(gate.dtype), 0).sum(0)
    return y, levels, chosen.sum(1).astype(jnp.float32)


def _choices(
    repeated: Mapping[str, Array], options: MoeConfig
) -> tuple[Array, Array, dict[str, losses.RouterSums]]:
    """Returns every token's expert, its gate and the routers' sums; all known at the source."""
    x, mask = repeated["x"], repeated["mask"]
    if options.routing == "one_level":
        only = routing.route(x, repeated["router"], mask)
        return only.index, only.gate, {"router": losses.router_sums(only, mask)}
    inter = routing.route(x, repeated["router_inter"], mask)
    kernel = repeated["router_intra"]
    if kernel.ndim == 3:
        every = jax.vmap(lambda own: routing.route(x, own, mask))(kernel)
        intra = jax.tree.map(lambda leaf: leaf[inter.index, jnp.arange(x.shape[0])], every)
    else:
        intra = routing.route(x, kernel, mask)
    index = inter.index * options.experts_per_node + intra.index
    sums = {"inter": losses.router_sums(inter, mask), "intra": losses.router_sums(intra, mask)}
    return index, inter.gate * intra.gate, sums
