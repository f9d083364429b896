"""Foreign checkpoint -> placed arrays, shard by shard: the host never holds the model.

A leaf's shard is read straight from the memory-mapped file: only the layers and slices that a
device needs, cut before they are transposed and cast.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import jax

from jaxmodels.core import params as params_lib
from jaxmodels.weights.importing import Index, LeafSource, leaf_sources
from jaxmodels.weights.rules import Rules


def load_sharded(
    template: Any, tensors: Mapping[str, Any], rules: Rules, *, dtype: Any = None
) -> Any:
    """Returns our parameters on their devices; equal to `import_weights`, placed.

    Besides what is placed, the host holds one shard of one leaf at a time (a device's part of it),
    and what the operating system keeps of the mapped file, which it drops when memory is short. A
    CPU device takes the shard itself: the host then holds nothing besides.

    Args:
      template: nested dict of `jax.ShapeDtypeStruct` with a `sharding` each; a leaf without one
        goes to the default device. Where there are several processes, each calls this, and reads
        for its own devices.
      tensors: what `read` returned.
      rules: the table of the checkpoint's family.
      dtype: of the floating-point leaves; None: that of the template's.

    Raises:
      WeightsError: as `import_weights`, before any value is read.
    """
    sources = leaf_sources(template, tensors, rules, dtype=dtype)
    leaves = params_lib.flatten(template)
    return params_lib.unflatten(
        {path: _place(source, leaves[path].sharding) for path, source in sources.items()}
    )


def _place(source: LeafSource, sharding: jax.sharding.Sharding | None) -> jax.Array:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    owners: dict[tuple[Any, ...], tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(source.shape).items():
        key = tuple((part.start, part.stop) for part in index)
        owners.setdefault(key, (index, []))[1].append(device)
    shards = []
    for index, devices in owners.values():
        values = source.read(index)
        placed = [jax.device_put(values, device) for device in devices]
        # A transfer under way keeps its host copy: without waiting they would pile up.
        shards += jax.block_until_ready(placed)
        del values, placed
        # JAX lets go of host copies at its own time; a collection, of the youngest, is one.
        gc.collect(0)
    return jax.make_array_from_single_device_arrays(source.shape, sharding, shards)
