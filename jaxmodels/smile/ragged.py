"""An exchange of as many rows as there are to each peer, into buffers that cannot overflow.

Where the buffers are too small the rows behind their end are left out on every side alike, and
`Traffic.overflow` says so: a caller then takes another way. XLA has no such exchange on CPUs, and
none between cells of one device: there it is emulated by padded blocks, with the same results.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.smile import exchange
from jaxmodels.smile.grid import Placement
from kernels_pallas import expert_dispatch

Array = jax.Array


@struct.dataclass
class Legs:
    """One direction of an exchange over K peers, all int32 [K].

    Attributes:
      take: where the rows for each peer start at the sender.
      sizes: how many they are.
      put: where they start at that peer.
      get: where the rows of each peer start here.
      get_sizes: how many come.
    """

    take: Array
    sizes: Array
    put: Array
    get: Array
    get_sizes: Array


@struct.dataclass
class Traffic:
    """An exchange and its way back.

    Attributes:
      there: towards the experts.
      back: the reverse.
      received: [] int32, rows that came.
      overflow: [] bool, rows were left out here.
    """

    there: Legs
    back: Legs
    received: Array
    overflow: Array


def traffic(axes: exchange.Axes, counts: Array, rows: int) -> Traffic:
    """Returns what goes where.

    Args:
      axes: (name, size) of the axes that span the K peers.
      counts: [K] int32, rows for each peer; at the sender they lie in this order.
      rows: of the receiving buffer.
    """
    matrix = counts
    for name, _ in reversed(axes):  # innermost first, so that the outermost stands in front
        matrix = jax.lax.all_gather(matrix, name)
    matrix, me = matrix.reshape(-1, counts.shape[0]), sum_index(axes)
    starts = _exclusive(matrix, 1)  # [sender, receiver], at the sender
    lands = jnp.minimum(_exclusive(matrix, 0), rows)  # the same at the receiver
    sizes = jnp.minimum(lands + matrix, rows) - lands

    def row(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, me, 0, keepdims=False)

    def column(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, me, 1, keepdims=False)

    sent, got = row(sizes), column(sizes)
    return Traffic(
        there=Legs(row(starts), sent, row(lands), column(lands), got),
        back=Legs(column(lands), got, column(starts), row(starts), sent),
        received=got.sum(),
        overflow=column(matrix).sum() > rows,
    )


def sum_index(axes: exchange.Axes) -> Array:
    """Returns the number of this cell along axes, outermost first."""
    index = jnp.int32(0)
    for name, size in axes:
        index = index * size + jax.lax.axis_index(name)
    return index


def _exclusive(matrix: Array, axis: int) -> Array:
    return jnp.cumsum(matrix, axis) - matrix


def send(where: Placement, axes: exchange.Axes, legs: Legs, x: Array, rows: int) -> Array:
    """Exchanges rows: [rows here, d] -> [rows, d], by sender; zero where none came.

    Args:
      where: of the cell.
      axes: (name, size) of the axes that span the peers.
      legs: from `traffic`.
      x: rows, those for each peer together.
      rows: of the result.
    """
    if not axes or not where.on_mesh:
        return emulated(axes, legs, x, rows)

    def real(legs: Legs, x: Array) -> Array:
        empty = jnp.zeros((rows, *x.shape[1:]), x.dtype) + x[:1] * 0
        offsets = (legs.take, legs.sizes, legs.put, legs.get_sizes)
        return jax.lax.ragged_all_to_all(x, empty, *offsets, axis_name=axes[0][0])

    def padded(legs: Legs, x: Array) -> Array:
        return emulated(axes, legs, x, rows)

    return jax.lax.platform_dependent(legs, x, cpu=padded, default=real)


def emulated(axes: exchange.Axes, legs: Legs, x: Array, rows: int) -> Array:
    """As `send`, by an exchange of equal blocks, each as long as all rows of a sender."""
    peers, block = legs.sizes.shape[0], min(x.shape[0], rows)
    r = jnp.arange(block)
    inside = r < legs.sizes[:, None]
    index = jnp.where(inside, legs.take[:, None] + r, -1).reshape(-1)
    blocks = expert_dispatch.take_rows(x, index, expert_dispatch.inverse(index, x.shape[0]), "xla")
    came = exchange.over(axes, blocks.reshape(peers, block, *x.shape[1:]))
    came = came.reshape(peers * block, *x.shape[1:])
    lands = jnp.where(r < legs.get_sizes[:, None], legs.get[:, None] + r, -1).reshape(-1)
    return expert_dispatch.take_rows(came, expert_dispatch.inverse(lands, rows), lands, "xla")
