"""The one mesh ('node', 'device') and the one table that lays parameters out on it.

`node` is the slow dimension (TPU slices over DCN, GPU hosts), `device` the fast one (ICI, NVLink).
Batches are split over both; parameters are split over `device` and repeated over `node` (hybrid
FSDP).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("node", "device")

# Logical axis -> mesh axis, in the order in which a parameter's axes claim `device`: the first
# one present whose length the mesh axis divides is split, all others stay whole. Experts are
# different matrices on every device and split over the whole mesh.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", AXES),
    ("expert", AXES),
    ("vocab", "device"),
    ("mlp", "device"),
    ("heads", "device"),
    ("embed", "device"),
    ("layers", None),
    ("length", None),
)

# Below this many scalars a parameter is repeated: gathering it would cost more than it saves.
MIN_SIZE_TO_SPLIT = 2**12


def make_mesh(node: int = -1, device: int = -1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh ('node', 'device') over `devices` (default: all of them).

    Args:
      node: slices or hosts; -1 takes the number of slices (or processes) where `device` is -1
        too, else what is left.
      device: devices a node; -1 takes what is left.
      devices: the devices to lay out.

    Raises:
      ValueError: node * device is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    total = len(devices)
    for name, size in (("node", node), ("device", device)):
        if size != -1 and (size < 1 or total % size):
            raise ValueError(
                f"mesh.{name}={size} does not divide the {total} devices present; "
                f"choose a divisor of {total} or -1 to infer it."
            )
    groups = _groups(devices)
    if node == -1:
        node = total // device if device != -1 else groups
    if device == -1:
        device = total // node
    if node * device != total:
        raise ValueError(
            f"mesh.node={node} x mesh.device={device} is {node * device} devices, but "
            f"{total} are present; make the product {total} or set one of them to -1."
        )
    return Mesh(_layout(devices, node, device, groups), AXES, axis_types=(AxisType.Auto,) * 2)


def _groups(devices: Sequence[Any]) -> int:
    """Number of slices (all hosts of a TPU slice share its fast links); else of processes."""
    slices = {getattr(d, "slice_index", None) for d in devices}
    if None not in slices:
        return len(slices)
    if devices[0].platform == "tpu":  # described, not attached: one slice goes without a number
        return 1
    return len({d.process_index for d in devices})


def _layout(devices: Sequence[Any], node: int, device: int, groups: int) -> np.ndarray:
    """Orders devices so that neighbours along `device` are physical neighbours."""
    if devices[0].platform == "tpu":
        if groups > 1 and node % groups == 0:
            return mesh_utils.create_hybrid_device_mesh(
                (node // groups, device), (groups, 1), devices=devices
            )
        return mesh_utils.create_device_mesh((node, device), devices=devices)
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    return np.array(ordered, dtype=object).reshape(node, device)


def unbox(tree: Any) -> Any:
    """Returns the parameters without their axis names: plain arrays in nested dicts."""
    return meta.unbox(tree)


def param_spec(
    shape: Sequence[int], names: Sequence[str | None], mesh: Mesh, axis: str = "device"
) -> PartitionSpec:
    """Returns the layout of one parameter of logical axes `names`, by `RULES`."""
    known = dict(RULES)
    unknown = [name for name in names if name is not None and name not in known]
    if unknown:
        raise ValueError(f"logical axes {unknown} have no rule; known axes: {sorted(known)}.")
    if "expert" in names and shape[names.index("expert")] % mesh.size == 0:
        return PartitionSpec(*(AXES if name == "expert" else None for name in names))
    if int(np.prod(shape)) >= MIN_SIZE_TO_SPLIT:
        for name, target in RULES:
            if target != axis:
                continue
            for i, (length, own) in enumerate(zip(shape, names, strict=True)):
                if own == name and length % mesh.shape[axis] == 0:
                    return PartitionSpec(*(axis if j == i else None for j in range(len(shape))))
    return PartitionSpec()


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding a leaf, in the structure of `unbox(boxed)`.

    Args:
      boxed: parameters or shape structs, boxed (leaves without a box are repeated).
      mesh: from `make_mesh`.
    """

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, meta.Partitioned):
            return NamedSharding(mesh, param_spec(leaf.value.shape, leaf.names, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch: its leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a value repeated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins the leading axis of `x` [batch, ...] to the mesh in scope; nothing outside a mesh.

    Keeps activations split by example at block borders, so that the partitioner never gathers
    them to meet a split parameter.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AXES[0] not in mesh.axis_names or mesh.size == 1:
        return x
    if x.shape[0] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(AXES))
