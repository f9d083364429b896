"""Exchanges between the cells of a grid: one all-to-all an axis, or one over both."""

import math

import jax

from jaxmodels.smile.grid import DEVICE, NODE, Placement

Axes = tuple[tuple[str, int], ...]


def over(axes: Axes, x: jax.Array) -> jax.Array:
    """Sends block k of `x` to peer k and returns the blocks received, by sender.

    Args:
      axes: (name, size) of the axes that span the peers, outermost first.
      x: [peers, ...].

    Returns:
      the same shape. The exchange is its own inverse.
    """
    shape = x.shape
    x = x.reshape(*(size for _, size in axes), *shape[1:])
    for dimension, (name, _) in enumerate(axes):
        x = jax.lax.all_to_all(x, name, dimension, dimension, tiled=True)
    return x.reshape(shape)


def two_hop(where: Placement, x: jax.Array) -> jax.Array:
    """Exchanges [n, m, ...] blocks: first inside the node, then between equal ranks of nodes."""
    x = over(where.device, x.swapaxes(0, 1)).swapaxes(0, 1)
    return over(where.node, x)


def flat(where: Placement, x: jax.Array) -> jax.Array:
    """Exchanges [n, m, ...] blocks by one all-to-all over both axes of the mesh."""
    axes = where.node + where.device
    shape = x.shape
    x = x.reshape(*(size for _, size in axes), *shape[2:])
    on_mesh = [i for i, (name, _) in enumerate(axes) if name in (NODE, DEVICE)]
    if len(on_mesh) > 1:
        # Both axes of the mesh in front and merged: the collective sees one axis of all devices.
        order = [*on_mesh, *(i for i in range(x.ndim) if i not in on_mesh)]
        x = x.transpose(order)
        moved = x.shape
        x = x.reshape(math.prod(moved[:2]), *moved[2:])
        x = jax.lax.all_to_all(x, (NODE, DEVICE), 0, 0, tiled=True).reshape(moved)
        x = x.transpose(sorted(range(len(order)), key=order.__getitem__))
        on_mesh_names: tuple[str, ...] = (NODE, DEVICE)
    else:
        on_mesh_names = ()
    for dimension, (name, _) in enumerate(axes):
        if name not in on_mesh_names:
            x = jax.lax.all_to_all(x, name, dimension, dimension, tiled=True)
    return x.reshape(shape)


TRANSPORTS = {"flat": flat, "two_hop": two_hop}
