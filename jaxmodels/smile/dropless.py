"""One MoE layer on one cell without capacities: rows travel as many as there are (section 10).

Both routings take the same way: between nodes first, then inside the node. Buffers hold
`buffer_factor` times the tokens of a device. Where any device of the grid would need more, all of
them run the tokens in chunks small enough for the worst case: slower, in the same memory, and
nothing is lost.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.smile import exchange, experts, losses, ragged, routing
from jaxmodels.smile.capacity_path import Cell, Sums, intra_kernel, noise
from jaxmodels.smile.grid import Placement
from jaxmodels.smile.settings import MoeConfig
from kernels_pallas import expert_dispatch

Array = jax.Array
Routers = Mapping[str, Array]


def run(
    where: Placement, routers: Routers, cell: Cell, options: MoeConfig, *, key: Array | None
) -> tuple[Array, Sums, dict[str, Array]]:
    """Returns y [T, d], the sums, and no stages: see `capacity_path.one_level`."""
    n, cells, tokens = where.grid.nodes, where.grid.size, cell.x.shape[0]
    room = math.ceil(options.buffer_factor * tokens)
    sizes = min(n * tokens, max(room, 1)), min(cells * tokens, max(room, 1))
    y, sums, overflow = _pass(where, routers, cell, options, key, sizes)
    if sizes == (n * tokens, cells * tokens):
        return y, sums, {}
    anywhere = overflow.astype(jnp.int32)
    for name in where.axis_names:
        anywhere = jax.lax.pmax(anywhere, name)

    def in_chunks(_: tuple[Array, Sums]) -> tuple[Array, Sums]:
        return _chunked(where, routers, cell, options, key)

    y, sums = jax.lax.cond(anywhere > 0, in_chunks, lambda done: done, (y, sums))
    return y, sums.replace(overflow=anywhere + sums.overflow), {}


def _chunked(
    where: Placement, routers: Routers, cell: Cell, options: MoeConfig, key: Array | None
) -> tuple[Array, Sums]:
    """Runs the tokens one chunk after the other, each with buffers for the worst case."""
    tokens, cells = cell.x.shape[0], where.grid.size
    chunks = min(tokens, math.ceil(cells / options.buffer_factor))
    length = -(-tokens // chunks)
    sizes = (where.grid.nodes * length, cells * length)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, chunks * length - tokens), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(chunks, length, *x.shape[1:])

    def one(_: None, chunk: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Sums]]:
        number, x, mask = chunk
        own = None if key is None else jax.random.fold_in(key, number)
        part = Cell(x, mask, cell.experts)
        return None, _pass(where, routers, part, options, own, sizes)[:2]

    parts = (jnp.arange(chunks), cut(cell.x), cut(cell.mask))
    _, (y, sums) = jax.lax.scan(one, None, parts)
    return y.reshape(-1, y.shape[-1])[:tokens], jax.tree.map(lambda x: x.sum(0), sums)


@struct.dataclass
class _Order:
    """Rows sorted by bucket: where each row goes, and which row stands at each place."""

    place: Array
    row: Array
    counts: Array


def _order(index: Array, valid: Array, buckets: int) -> _Order:
    """Stable order by bucket without a sort: first place of the bucket plus the position in it."""
    counts = routing.counts(index, valid, buckets)
    first = jnp.cumsum(counts) - counts
    own = jnp.where(jax.nn.one_hot(index, buckets, dtype=bool), first, 0).sum(-1)
    place = jnp.where(valid, own + routing.positions(index, valid, buckets), -1)
    place = place.astype(jnp.int32)
    return _Order(place, expert_dispatch.inverse(place, index.shape[0]), counts)


def _sorted(order: _Order, x: Array, dispatch: str | None) -> Array:
    return expert_dispatch.take_rows(x, order.row, order.place, dispatch)


def _unsorted(order: _Order, x: Array, dispatch: str | None) -> Array:
    return expert_dispatch.take_rows(x, order.place, order.row, dispatch)


def _pass(
    where: Placement,
    routers: Routers,
    cell: Cell,
    options: MoeConfig,
    key: Array | None,
    sizes: tuple[int, int],
) -> tuple[Array, Sums, Array]:
    """One pass over all tokens with buffers of `sizes` rows; the third result: one overflowed."""
    n, m, x = where.grid.nodes, where.grid.devices, cell.x
    bi_level = options.routing == "bi_level"
    buckets = options.experts_per_node
    jitter = noise(where, key, 0, x, options.jitter)
    first = routing.route(x, routers["router_inter" if bi_level else "router"], cell.mask, jitter)
    node = first.index if bi_level else first.index // buckets

    order1 = _order(node, cell.mask, n)
    hop1 = ragged.traffic(where.node, order1.counts, sizes[0])

    def outward(x: Array, dispatch: str | None) -> Array:
        return ragged.send(where, where.node, hop1.there, _sorted(order1, x, dispatch), sizes[0])

    rows = outward(x, options.dispatch)
    valid = jnp.arange(sizes[0]) < hop1.received
    levels = {"inter" if bi_level else "router": losses.router_sums(first, cell.mask)}
    if bi_level:
        jitter = noise(where, key, 1, rows, options.jitter)
        second = routing.route(rows, intra_kernel(where, routers["router_intra"]), valid, jitter)
        levels["intra"] = losses.router_sums(second, valid)
        bucket = second.index
    else:  # the choice was made at the source and travels along
        bucket = outward((first.index % buckets)[:, None], "xla")[:, 0]

    done, sent, overflow2 = _inside_node(where, cell, options, rows, (bucket, valid), sizes[1])
    if bi_level:
        done = (second.gate[:, None] * done.astype(second.gate.dtype)).astype(x.dtype)
        done = jnp.where(valid[:, None], done, 0)
    else:
        sent = routing.counts(first.index, cell.mask, options.num_experts).reshape(n, m, -1)
    home = ragged.send(where, where.node, hop1.back, done, x.shape[0])
    y = expert_dispatch.combine(home, order1.place, first.gate, order1.row, options.dispatch)
    overflow = hop1.overflow | overflow2
    nothing = (cell.mask.sum() * 0).astype(jnp.float32)
    return y, Sums(levels, sent.astype(jnp.float32), nothing), overflow


def _inside_node(
    where: Placement,
    cell: Cell,
    options: MoeConfig,
    rows: Array,
    chosen: tuple[Array, Array],
    size: int,
) -> tuple[Array, Array, Array]:
    """Sends rows to the devices of the node, through their experts and back.

    Args:
      where: of the cell.
      cell: gives the experts.
      options: of the layer.
      rows: [rows, d].
      chosen: bucket [rows] int32 (device times e plus expert), and which rows are valid.
      size: rows of the buffer at the experts.

    Returns:
      what the experts made of the rows; [m, e] int32 how many went where; overflow.
    """
    m, e = where.grid.devices, options.experts_per_device
    order = _order(*chosen, m * e)
    counts = order.counts.reshape(m, e)
    hop = ragged.traffic(where.device, counts.sum(1), size)
    moved = _sorted(order, rows, options.dispatch)
    got = ragged.send(where, where.device, hop.there, moved, size)
    # A sender's rows come sorted by expert; its counts say where one expert's end.
    parts = exchange.over(where.device, counts)
    ends = hop.there.get[:, None] + jnp.cumsum(parts, 1)
    number = jnp.arange(size)
    member = (number >= (ends - parts).reshape(-1, 1)) & (number < ends.reshape(-1, 1))
    expert = (member.reshape(m, e, size).any(0) * jnp.arange(e)[:, None]).sum(0).astype(jnp.int32)
    by_expert = _order(expert, number < hop.received, e)
    grouped = _sorted(by_expert, got, options.dispatch)
    dense = not where.on_mesh
    out = experts.rows(cell.experts, grouped, by_expert.counts, options.activation, dense)
    out = _unsorted(by_expert, out, options.dispatch)
    returned = ragged.send(where, where.device, hop.back, out, rows.shape[0])
    return _unsorted(order, returned, options.dispatch), counts, hop.overflow
