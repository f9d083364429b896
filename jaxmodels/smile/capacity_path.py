"""One MoE layer on one cell of the grid with buffers of fixed capacity (sections 4 and 5)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.smile import exchange, experts, losses, routing
from jaxmodels.smile.grid import Placement
from jaxmodels.smile.settings import MoeConfig
from kernels_pallas import expert_dispatch

Array = jax.Array


@struct.dataclass
class Cell:
    """What one cell holds.

    Attributes:
      x: [T, d], its tokens.
      mask: [T] bool; the others are padding.
      experts: `wi` [e, d, f], `wo`, and where there are biases `bi`, `bo`.
    """

    x: Array
    mask: Array
    experts: Mapping[str, Array]


@struct.dataclass
class Sums:
    """What one cell reports; additive over cells, layers and micro-batches.

    Attributes:
      levels: `losses.RouterSums` by router: "router", or "inter" and "intra".
      sent: float32, rows that this cell sent to experts: [n, m, e] (one level), or [m, e] of its
        own node (bi-level).
      overflow: [] float32, 1 where small buffers were too small and the safe path ran (dropless).
    """

    levels: dict[str, losses.RouterSums]
    sent: Array
    overflow: Array


@struct.dataclass
class Level:
    """The choices of one router and where they put its rows."""

    routed: routing.Route
    slots: routing.Slots


def noise(where: Placement, key: Array | None, level: int, x: Array, eps: float) -> Array | None:
    """Returns the jitter of a router's input on this cell; the same on every mesh."""
    if key is None or not eps:
        return None
    own = jax.random.fold_in(jax.random.fold_in(key, level), where.cell_index())
    return routing.jitter_noise(own, x.shape, eps)


def one_level(
    where: Placement,
    routers: Mapping[str, Array],
    cell: Cell,
    options: MoeConfig,
    capacities: tuple[int, ...],
    key: Array | None,
) -> tuple[Array, Sums, dict[str, Any]]:
    """Switch: one router over all E experts, one exchange there and one back.

    Args:
      where: of the cell.
      routers: `router` [d, E].
      cell: tokens and experts.
      options: `MoeConfig`.
      capacities: (C,) slots an expert and sender.
      key: for jitter; None: no jitter.

    Returns:
      y [T, d]; zero where dropped or masked.
      the sums.
      the stages by name, for tests and pictures; unused ones cost nothing once compiled.
    """
    (capacity,) = capacities
    n, m = where.grid.nodes, where.grid.devices
    x, d = cell.x, cell.x.shape[-1]
    kernel = routers["router"]
    e, num_experts = kernel.shape[-1] // (n * m), kernel.shape[-1]
    swap = functools.partial(exchange.TRANSPORTS[options.transport], where)

    routed = routing.route(x, kernel, cell.mask, noise(where, key, 0, x, options.jitter))
    slots = routing.slots(routed, num_experts, capacity)
    row = expert_dispatch.inverse(slots.slot, num_experts * capacity)
    send = expert_dispatch.take_rows(x, row, slots.slot, options.dispatch).reshape(
        n, m, e, capacity, d
    )
    received = swap(send)
    expert_in = received.transpose(2, 0, 1, 3, 4).reshape(e, n * m * capacity, d)
    expert_out = _experts(cell, expert_in, options)
    back = expert_out.reshape(e, n, m, capacity, d).transpose(1, 2, 0, 3, 4)
    returned = swap(back).reshape(num_experts * capacity, d)
    y = expert_dispatch.combine(returned, slots.slot, routed.gate, row, options.dispatch)

    sent = routing.counts(routed.index, slots.kept, num_experts).reshape(n, m, e)
    levels = {"router": losses.router_sums(routed, slots.kept)}
    sums = Sums(levels, sent.astype(jnp.float32), _zero(cell.mask))
    stages = {
        "router": Level(routed, slots),
        "send": send,
        "expert_in": expert_in,
        "expert_out": expert_out,
    }
    return y, sums, stages


def bi_level(
    where: Placement,
    routers: Mapping[str, Array],
    cell: Cell,
    options: MoeConfig,
    capacities: tuple[int, ...],
    key: Array | None,
) -> tuple[Array, Sums, dict[str, Any]]:
    """SMILE: a router over nodes, then one over the experts of the chosen node.

    Args:
      where: of the cell.
      routers: `router_inter` [d, n], `router_intra` [d, m e] (or [n, d, m e], one a node).
      cell: tokens and experts.
      options: `MoeConfig`.
      capacities: (C1, C2): slots a node and sender, then slots an expert and sender.
      key: for jitter; None: no jitter.

    Returns:
      as `one_level`.
    """
    first, second = capacities
    n, m = where.grid.nodes, where.grid.devices
    x, d = cell.x, cell.x.shape[-1]
    own = intra_kernel(where, routers["router_intra"])
    buckets = own.shape[-1]
    e = buckets // m

    # Level 1, at the source: to the device of the same rank in the chosen node.
    inter = routing.route(
        x, routers["router_inter"], cell.mask, noise(where, key, 0, x, options.jitter)
    )
    slots1 = routing.slots(inter, n, first)
    row1 = expert_dispatch.inverse(slots1.slot, n * first)
    send1 = expert_dispatch.take_rows(x, row1, slots1.slot, options.dispatch).reshape(n, first, d)
    received = exchange.over(where.node, send1)
    rows = received.reshape(n * first, d)
    # Kept rows fill a block from its start, so a count a block says which rows are real. An empty
    # row must never be routed: all of them tie, and would eat the capacity of expert 0.
    filled = exchange.over(where.node, routing.counts(inter.index, slots1.kept, n))
    valid = (jnp.arange(first) < filled[:, None]).reshape(-1)

    # Level 2, on arrival: to a device of this node.
    intra = routing.route(rows, own, valid, noise(where, key, 1, rows, options.jitter))
    slots2 = routing.slots(intra, buckets, second)
    row2 = expert_dispatch.inverse(slots2.slot, buckets * second)
    send2 = expert_dispatch.take_rows(rows, row2, slots2.slot, options.dispatch).reshape(
        m, e, second, d
    )
    expert_in = exchange.over(where.device, send2).transpose(1, 0, 2, 3).reshape(e, m * second, d)
    expert_out = _experts(cell, expert_in, options)

    # Back the same way; each level multiplies its own gate.
    back = expert_out.reshape(e, m, second, d).transpose(1, 0, 2, 3)
    returned = exchange.over(where.device, back).reshape(buckets * second, d)
    gated = expert_dispatch.combine(returned, slots2.slot, intra.gate, row2, options.dispatch)
    home = exchange.over(where.node, gated.reshape(n, first, d)).reshape(n * first, d)
    y = expert_dispatch.combine(home, slots1.slot, inter.gate, row1, options.dispatch)

    sent = routing.counts(intra.index, slots2.kept, buckets).reshape(m, e)
    levels = {
        "inter": losses.router_sums(inter, slots1.kept),
        "intra": losses.router_sums(intra, slots2.kept),
    }
    sums = Sums(levels, sent.astype(jnp.float32), _zero(cell.mask))
    stages = {
        "inter": Level(inter, slots1),
        "intra": Level(intra, slots2),
        "send": send1,
        "received": received,
        "intra_send": send2,
        "expert_in": expert_in,
        "expert_out": expert_out,
    }
    return y, sums, stages


def intra_kernel(where: Placement, kernel: Array) -> Array:
    """Returns the intra router of this cell's node, [d, m e]."""
    if kernel.ndim == 2:
        return kernel
    return jax.lax.dynamic_index_in_dim(kernel, where.node_index(), 0, keepdims=False)


def _experts(cell: Cell, x: Array, options: MoeConfig) -> Array:
    # Recomputed in the backward pass where asked; the exchanges around it never are.
    function = functools.partial(experts.blocks, activation=options.activation)
    return (jax.checkpoint(function) if options.remat else function)(cell.experts, x)


def _zero(mask: Array) -> Array:
    # Made of an array of this cell, so that it varies over the mesh like the other sums.
    return (mask.sum() * 0).astype(jnp.float32)
