"""The grid of nodes and devices that routing is defined on, and how it lies on the real mesh.

Routing depends on the grid (n nodes of m devices), not on the machine: a grid larger than the mesh
puts several of its cells on one device, where exchanges become transpositions. The same function
therefore runs, with the same results, on one device and on any mesh that divides the grid.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxmodels.core import partitioning

NODE, DEVICE = partitioning.AXES
_CELLS = {NODE: "cell_node", DEVICE: "cell_device"}  # axes of the cells inside one real device


@dataclasses.dataclass(frozen=True)
class Grid:
    """n nodes of m devices.

    Attributes:
      nodes: n; the slow dimension.
      devices: m; devices a node.

    Raises:
      ValueError: a size below 1.
    """

    nodes: int = 1
    devices: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.devices < 1:
            raise ValueError(
                f"a grid of {self.nodes} nodes x {self.devices} devices: both must be at least 1."
            )

    @property
    def size(self) -> int:
        """G = n m."""
        return self.nodes * self.devices

    def experts_per_device(self, num_experts: int) -> int:
        """Returns e = E / G.

        Raises:
          ValueError: the grid does not divide the experts.
        """
        if num_experts < 1 or num_experts % self.size:
            raise ValueError(
                f"num_experts={num_experts} is no multiple of n={self.nodes} nodes x "
                f"m={self.devices} devices = {self.size}; choose E = {self.size} e with e >= 1."
            )
        return num_experts // self.size


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one cell of the grid finds the others.

    Attributes:
      grid: n x m.
      node: (axis name, size) of the axes that together span the nodes, outermost first; axes of
        size 1 are left out.
      device: the same of the devices of a node.
    """

    grid: Grid
    node: tuple[tuple[str, int], ...]
    device: tuple[tuple[str, int], ...]

    @property
    def on_mesh(self) -> bool:
        """Whether every axis is one of the mesh: one cell a device."""
        return all(name in (NODE, DEVICE) for name, _ in self.node + self.device)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """All axes that have to be reduced over to see every cell."""
        return tuple(name for name, _ in self.node + self.device)

    def node_index(self) -> jax.Array | int:
        """i of this cell."""
        return _index(self.node)

    def cell_index(self) -> jax.Array | int:
        """i m + j of this cell."""
        return self.node_index() * self.grid.devices + _index(self.device)


def _index(axes: tuple[tuple[str, int], ...]) -> jax.Array | int:
    index: jax.Array | int = 0
    for name, size in axes:
        index = index * size + jax.lax.axis_index(name)
    return index


def mesh_sizes() -> tuple[int, int]:
    """Returns (nodes, devices) of the mesh in scope; (1, 1) outside a mesh.

    Raises:
      ValueError: the mesh has not the axes ('node', 'device').
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    missing = [axis for axis in partitioning.AXES if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"the mesh in scope has axes {mesh.axis_names} and lacks {missing}; "
            "make it with core.partitioning.make_mesh(node, device)."
        )
    return mesh.shape[NODE], mesh.shape[DEVICE]


def placement(grid: Grid) -> Placement:
    """Returns how `grid` lies on the mesh in scope.

    Raises:
      ValueError: the mesh's nodes or devices do not divide the grid's.
    """
    sizes = mesh_sizes()
    spans = []
    for axis, wanted, present in zip(
        partitioning.AXES, (grid.nodes, grid.devices), sizes, strict=True
    ):
        if wanted % present:
            raise ValueError(
                f"a grid of n={grid.nodes} nodes x m={grid.devices} devices does not lie on a mesh "
                f"of node={sizes[0]} x device={sizes[1]}: {axis}={present} must divide {wanted}. "
                "Routing depends on the grid; give the mesh axes that divide it."
            )
        axes = ((axis, present), (_CELLS[axis], wanted // present))
        spans.append(tuple((name, size) for name, size in axes if size > 1))
    return Placement(grid, *spans)


def run(
    function: Callable[..., Any],
    grid: Grid,
    repeated: Any,
    split: Any,
    check_vma: bool = True,
) -> Any:
    """Runs `function(placement, repeated, cell)` for every cell of the grid.

    Args:
      function: of one cell; its collectives run over the axes of the placement.
      grid: n x m.
      repeated: arrays that every cell sees.
      split: arrays [n, m, ...]; a cell gets its own part [...].
      check_vma: see `jax.shard_map`.

    Returns:
      the results [n, m, ...].

    Raises:
      ValueError: see `placement`.
    """
    where = placement(grid)

    def cells(repeated: Any, split: Any) -> Any:
        lengths = jax.tree.leaves(split)[0].shape[:2]
        inner = lambda cell: function(where, repeated, cell)  # noqa: E731
        if lengths == (1, 1):
            one = jax.tree.map(lambda x: x.reshape(x.shape[2:]), split)
            return jax.tree.map(lambda x: x[None, None], inner(one))
        rows = jax.vmap(inner, axis_name=_CELLS[DEVICE])
        return jax.vmap(rows, axis_name=_CELLS[NODE])(split)

    if mesh_sizes() == (1, 1):
        return cells(repeated, split)
    spec = PartitionSpec(NODE, DEVICE)
    # The check does not know the axes of a vmap, so it is for one cell a device.
    check_vma = check_vma and where.on_mesh
    sharded = jax.shard_map(
        cells, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=check_vma
    )
    return sharded(repeated, split)


def check_nodes(mesh: Mesh, allow_mixed: bool = False) -> None:
    """Checks that each row of the mesh's `device` axis is one node: one TPU slice, or one host.

    Args:
      mesh: with axes ('node', 'device').
      allow_mixed: do not ask; for meshes laid out on purpose.

    Raises:
      ValueError: a row mixes slices (hosts, where devices have no slice), naming the devices.
    """
    if allow_mixed or mesh.devices.flat[0].platform == "cpu":
        return  # simulated devices: any row is as good as another
    by_slice = _has_slices(mesh)
    what = "slice" if by_slice else "host"
    for number, row in enumerate(mesh.devices.reshape(mesh.shape[NODE], -1)):
        # A described slice that is the only one goes without a number.
        own = [getattr(d, "slice_index", None) if by_slice else d.process_index for d in row]
        found = {d.id: index for d, index in zip(row, own, strict=True)}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"node {number} of the mesh mixes {what}s: device id -> {what} {found}. Exchanges "
                f"inside a node would cross the slow network; make mesh.node a multiple of the "
                f"number of {what}s, or set allow_mixed (--config.moe.allow_mixed_nodes=true)."
            )


def _has_slices(mesh: Mesh) -> bool:
    devices = list(mesh.devices.flat)
    on_tpu = devices[0].platform == "tpu"
    return on_tpu or all(getattr(d, "slice_index", None) is not None for d in devices)
