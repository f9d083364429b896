"""Attention over weighted tokens: checks the inputs and picks the implementation by platform.

Symbols: B batch, r tokens, h heads, dh width of a head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.weighted_attention import gpu, reference, xla
from kernels_pallas.weighted_attention.relative import RelativeBias, thresholds

IMPLEMENTATIONS = ("tpu", "gpu", "chunked", "reference", "interpret")
DTYPES = (jnp.float32, jnp.bfloat16)


def weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_bias: jax.Array,
    relative: RelativeBias | None = None,
    *,
    implementation: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> jax.Array:
    """softmax(q k + key bias + relative bias) v, without [r, r] scores in memory.

    Differentiable by everything but the positions. The softmax is in float32. A key bias of -1000,
    -1e9 or minus infinity hides a key; where every key of an example has the same, it does nothing.

    Args:
      query: [B, r, h, dh] float32 or bfloat16, already scaled.
      key: as `query`.
      value: as `query`.
      key_bias: [B, r] float32, added to all scores of a key: log counts, gates, masks.
      relative: T5's bias by distance key - query, with positions [B, r] and a table
        [num_buckets, h].
      implementation: "tpu" (Mosaic kernels), "gpu" (cuDNN, or chunks where it does not fit),
        "chunked" (XLA), "reference" (all scores at once), "interpret" (the TPU kernels in Python,
        for tests), or None: by the platform that is traced for.
      batch_axes: mesh axes that the batch is split over; each device then runs its own examples.
        Axes that are not in the mesh in scope are ignored.

    Returns:
      [B, r, h, dh] in the dtype of the inputs.

    Raises:
      ValueError: shapes, dtypes or names that do not fit.
    """
    platform = _platform()
    if implementation is None:
        implementation = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(platform, "chunked")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: use None or one of {IMPLEMENTATIONS}."
        )
    _check(query, key, value, key_bias)
    if relative is not None:
        _check_relative(query, relative)
    inputs = (query, key, value, key_bias, relative)
    if implementation == "reference":
        return reference.weighted_attention(*inputs)

    def run(query, key, value, key_bias, relative):
        inputs = (query, key, value, reference.shifted(key_bias), relative)
        if implementation == "gpu":
            return gpu.weighted_attention(*inputs)
        if implementation == "chunked":
            chunk = xla.CHUNK.get(platform, xla.CHUNK_ELSEWHERE)
            compute_dtype = jnp.float32 if platform == "cpu" else None
            return xla.weighted_attention(*inputs, chunk=chunk, compute_dtype=compute_dtype)
        # Importing Pallas takes a second: only where it is needed.
        from kernels_pallas.weighted_attention import tpu

        return tpu.weighted_attention(*inputs, interpret=implementation == "interpret")

    return _each_shard(run, inputs, batch_axes)(*inputs)


def _each_shard(
    run: Callable[..., jax.Array], inputs: tuple[Any, ...], batch_axes: tuple[str, ...]
) -> Callable[..., jax.Array]:
    """`run` on each device's examples: XLA cannot split a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(a for a in batch_axes if kinds.get(a, AxisType.Manual) != AxisType.Manual)
    if not axes:
        return run
    parts = int(np.prod([mesh.shape[a] for a in axes]))
    rows = PartitionSpec(axes if inputs[0].shape[0] % parts == 0 else None)
    relative = inputs[-1]
    if relative is not None:
        relative = dataclasses.replace(relative, positions=rows, table=PartitionSpec())
    specs = (rows, rows, rows, rows, relative)
    return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)


def _platform() -> str:
    """The platform that is traced for: the mesh's in scope, else jax's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _check(query: jax.Array, key: jax.Array, value: jax.Array, key_bias: jax.Array) -> None:
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    if query.ndim != 4 or len(set(shapes.values())) > 1 or 0 in query.shape:
        raise ValueError(f"{shapes}: wanted one shape [B, r, h, dh], every axis at least 1.")
    if key_bias.shape != query.shape[:2]:
        raise ValueError(f"key_bias {key_bias.shape}: wanted [B, r] = {query.shape[:2]}.")
    dtypes = [x.dtype.name for x in (query, key, value)]
    if len(set(dtypes)) > 1 or query.dtype not in DTYPES:
        raise ValueError(f"query, key, value are {dtypes}: wanted all float32 or all bfloat16.")
    if key_bias.dtype != jnp.float32:
        raise ValueError(
            f"key_bias is {key_bias.dtype}: wanted float32, log counts need its digits."
        )


def _check_relative(query: jax.Array, relative: RelativeBias) -> None:
    positions, table, heads = relative.positions, relative.table, query.shape[2]
    if positions.shape != query.shape[:2] or positions.dtype != jnp.int32:
        raise ValueError(
            f"positions {positions.shape} {positions.dtype}: wanted [B, r] = {query.shape[:2]}, "
            "int32."
        )
    if table.ndim != 2 or table.shape[1] != heads or not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(
            f"table {table.shape} {table.dtype}: wanted [num_buckets, h], h = {heads}, floating."
        )
    thresholds(relative.num_buckets, relative.max_distance)  # raises where no buckets can be made
