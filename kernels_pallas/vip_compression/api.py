"""Opening and closing blocks with gradients: checks the arrays and picks the implementation.

The gradients keep indices and masks, never a bank: all four operations are linear in their states.
In a loop over layers `open_blocks` hands the banks on to `write_back`; then the cotangent of the
bank of differences is one array, updated in place from layer to layer, as the bank itself is.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.vip_compression import reference

# "xla" is plain JAX with the gradients of here; "interpret" runs the TPU kernels on any platform.
BACKENDS = ("xla", "tpu", "gpu", "interpret")
DTYPES = (jnp.float32, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Call:
    """How to run: a backend, or None for that of the platform; mesh axes that split the batch."""

    backend: str | None
    batch_axes: tuple[str, ...]

    def __call__(self, name: str, *arrays: jax.Array, **options: Any) -> Any:
        """Runs the function `name` of an implementation."""
        plain = functools.partial(getattr(reference, name), **options)
        if self.backend == "xla":
            return plain(*arrays)
        if self.backend == "interpret":
            options["interpret"] = True
        kernel = functools.partial(getattr(_kernels(self.backend), name), **options)
        kernel = self._each_shard(kernel, arrays[0].shape[0])
        if self.backend is not None:
            return kernel(*arrays)
        return jax.lax.platform_dependent(*arrays, tpu=kernel, default=plain)

    def _each_shard(self, kernel: Callable[..., Any], batch: int) -> Callable[..., Any]:
        """`kernel` on each device's examples: XLA cannot split a kernel by itself."""
        mesh = jax.sharding.get_abstract_mesh()
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        axes = tuple(a for a in self.batch_axes if kinds.get(a, AxisType.Manual) != AxisType.Manual)
        if not axes:
            return kernel
        parts = int(np.prod([mesh.shape[a] for a in axes]))
        spec = PartitionSpec(axes if batch % parts == 0 else None)
        return jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)


def refine(
    coarse: jax.Array,
    difference: jax.Array,
    index: jax.Array,
    *,
    backend: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Opens blocks: the tokens C - D of the blocks at `index`.

    Args:
      coarse: C [batch, m, d_model], float32 or bfloat16.
      difference: D [batch, m, block, d_model], float32 or bfloat16.
      index: [batch, k] integers in [0, m), different within an example. Concrete ones are
        checked; traced ones beyond the ends are moved to the ends.
      backend: one of `BACKENDS`; None: the kernels on TPU where they fit (block a multiple of 8,
        d_model of 128), XLA elsewhere. "gpu" needs Hopper or later.
      batch_axes: mesh axes that the batch is split over; the kernel then runs on each device's
        own examples. Axes that are not in the mesh in scope are ignored.

    Returns:
      [batch, k, block, d_model] in the wider of the two dtypes.

    Raises:
      ValueError: shapes, dtypes or indices that do not fit, or a backend that does not.
    """
    return open_blocks(coarse, difference, index, backend=backend, batch_axes=batch_axes)[0]


def open_blocks(
    coarse: jax.Array,
    difference: jax.Array,
    index: jax.Array,
    *,
    backend: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Opens blocks as `refine`, and hands the banks on.

    Use the banks that come back in place of those given. Then the backward pass adds the gradient
    of the tokens to the cotangents of the banks in place, instead of making new ones.

    Args:
      coarse: as `refine`, as all the others.
      difference: see there.
      index: see there.
      backend: see there.
      batch_axes: see there.

    Returns:
      tokens [batch, k, block, d_model], `coarse` and `difference`.

    Raises:
      ValueError: as `refine`.
    """
    _check_banks(coarse, difference)
    index = _checked_index(index, coarse.shape)
    if not index.shape[1]:
        dtype = reference.token_dtype(coarse, difference)
        return jnp.zeros((*index.shape, *difference.shape[2:]), dtype), coarse, difference
    call = _call(backend, batch_axes, difference.shape)
    return _open(call, coarse, difference, index)


def write_back(
    coarse: jax.Array,
    difference: jax.Array,
    index: jax.Array,
    fine: jax.Array,
    mask: jax.Array,
    *,
    backend: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Closes blocks: new means c = sum(f M) / (count + 1e-4) and differences c - f M at `index`.

    Other blocks keep what they hold. The banks are updated in place where they are donated or not
    used again. Sums are in float32, and the differences are those to the unrounded mean.

    Args:
      coarse: C [batch, m, d_model], float32 or bfloat16.
      difference: D [batch, m, block, d_model], float32 or bfloat16.
      index: [batch, k], as in `refine`.
      fine: F [batch, k, block, d_model], the tokens of these blocks.
      mask: M [batch, k, block], 1 on real tokens; float, int or bool; gets no gradient.
      backend: as `refine`.
      batch_axes: as `refine`.

    Returns:
      C and D, in their dtypes.

    Raises:
      ValueError: as `refine`.
    """
    _check_banks(coarse, difference)
    index = _checked_index(index, coarse.shape)
    _check("fine", fine, (*index.shape, *difference.shape[2:]))
    _check("mask", mask, fine.shape[:3], dtypes=None)
    if not index.shape[1]:
        return coarse, difference
    call = _call(backend, batch_axes, difference.shape)
    return _write(call, coarse, difference, index, fine, mask.astype(jnp.float32))


def enter(
    tokens: jax.Array,
    mask: jax.Array,
    *,
    backend: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Compresses every block of a sequence.

    Args:
      tokens: [batch, m, block, d_model], float32 or bfloat16.
      mask: M [batch, m, block], 1 on real tokens; gets no gradient.
      backend: as `refine`.
      batch_axes: as `refine`.

    Returns:
      C [batch, m, d_model] and D [batch, m, block, d_model] in the dtype of tokens.

    Raises:
      ValueError: as `refine`.
    """
    if tokens.ndim != 4:
        raise ValueError(f"tokens {tokens.shape}: must be [batch, m, block, d_model].")
    _check("tokens", tokens, tokens.shape)
    _check("mask", mask, tokens.shape[:3], dtypes=None)
    return _enter(_call(backend, batch_axes, tokens.shape), tokens, mask.astype(jnp.float32))


def leave(
    coarse: jax.Array,
    difference: jax.Array,
    mask: jax.Array,
    *,
    backend: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Opens every block for good: (C - D) * M; padding becomes exactly 0.

    Args:
      coarse: C [batch, m, d_model].
      difference: D [batch, m, block, d_model].
      mask: M [batch, m, block], 1 on real tokens; gets no gradient.
      backend: as `refine`.
      batch_axes: as `refine`.

    Returns:
      [batch, m, block, d_model] in the wider of the two dtypes.

    Raises:
      ValueError: as `refine`.
    """
    _check_banks(coarse, difference)
    _check("mask", mask, difference.shape[:3], dtypes=None)
    call = _call(backend, batch_axes, difference.shape)
    return _leave(call, coarse, difference, mask.astype(jnp.float32))


def supports(backend: str, block_size: int, d_model: int) -> bool:
    """Returns whether blocks of that many tokens and that width fit the kernels of a backend."""
    if backend == "xla":
        return True
    return _kernels(backend).supports(block_size, d_model)


def _kernels(backend: str | None) -> Any:
    """Returns the kernels of a backend; importing Pallas takes a second, so only where needed."""
    name = "gpu" if backend == "gpu" else "tpu"
    return importlib.import_module(f"kernels_pallas.vip_compression.{name}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _open(call: _Call, coarse: jax.Array, difference: jax.Array, index: jax.Array) -> Any:
    return call("refine", coarse, difference, index), coarse, difference


def _open_forward(call: _Call, coarse: jax.Array, difference: jax.Array, index: jax.Array) -> Any:
    return _open(call, coarse, difference, index), index


def _open_backward(call: _Call, index: jax.Array, bars: tuple[jax.Array, ...]) -> Any:
    fine_bar, coarse_bar, difference_bar = bars
    return *call("refine_gradient", coarse_bar, difference_bar, index, fine_bar), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _write(call: _Call, *arrays: jax.Array) -> Any:
    return call("write_back", *arrays)


def _write_forward(call: _Call, *arrays: jax.Array) -> Any:
    _, _, index, fine, mask = arrays
    return _write(call, *arrays), (index, mask, _dtype_of(fine))


def _write_backward(call: _Call, kept: Any, bars: tuple[jax.Array, jax.Array]) -> Any:
    index, mask, like = kept
    found = call("write_back_gradient", *bars, index, mask, dtype=like.dtype)
    coarse_bar, difference_bar, fine_bar = found
    return coarse_bar, difference_bar, None, fine_bar, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(call: _Call, tokens: jax.Array, mask: jax.Array) -> Any:
    return call("enter", tokens, mask)


def _enter_forward(call: _Call, tokens: jax.Array, mask: jax.Array) -> Any:
    return _enter(call, tokens, mask), mask


def _enter_backward(call: _Call, mask: jax.Array, bars: tuple[jax.Array, jax.Array]) -> Any:
    return call("enter_gradient", *bars, mask), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(call: _Call, coarse: jax.Array, difference: jax.Array, mask: jax.Array) -> Any:
    return call("leave", coarse, difference, mask)


def _leave_forward(call: _Call, coarse: jax.Array, difference: jax.Array, mask: jax.Array) -> Any:
    kept = mask, _dtype_of(coarse), _dtype_of(difference)
    return _leave(call, coarse, difference, mask), kept


def _leave_backward(call: _Call, kept: Any, tokens_bar: jax.Array) -> Any:
    mask, *likes = kept
    dtypes = tuple(like.dtype for like in likes)
    return *call("leave_gradient", tokens_bar, mask, dtypes=dtypes), None


_open.defvjp(_open_forward, _open_backward)
_write.defvjp(_write_forward, _write_backward)
_enter.defvjp(_enter_forward, _enter_backward)
_leave.defvjp(_leave_forward, _leave_backward)


def _dtype_of(array: jax.Array) -> jax.Array:
    """An empty array of that dtype: gradients have the dtype of what they belong to."""
    return jnp.zeros((0,), array.dtype)


def _call(backend: str | None, batch_axes: tuple[str, ...], shape: tuple[int, ...]) -> _Call:
    """Returns how to run on a bank of this shape."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: use one of {', '.join(BACKENDS)}, or None.")
    fit = "at most 128, times" if backend == "gpu" else "multiples of 8 and"
    if not supports("tpu" if backend is None else backend, *shape[2:]):
        if backend is not None:
            raise ValueError(
                f"backend={backend!r}: blocks of {shape[2]} tokens x {shape[3]} do not fit its "
                f"kernels ({fit} a multiple of 128); use backend='xla' or None."
            )
        backend = "xla"
    return _Call(backend, tuple(batch_axes))


def _check_banks(coarse: jax.Array, difference: jax.Array) -> None:
    if difference.ndim != 4:
        raise ValueError(f"difference {difference.shape}: must be [batch, m, block, d_model].")
    _check("difference", difference, difference.shape)
    _check("coarse", coarse, (*difference.shape[:2], difference.shape[3]))


def _check(name: str, array: jax.Array, shape: tuple[int, ...], dtypes: Any = DTYPES) -> None:
    if array.shape != tuple(shape):
        raise ValueError(f"{name} {array.shape}: must be {tuple(shape)} to fit the other arrays.")
    if dtypes is not None and array.dtype not in dtypes:
        accepted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{name} is {array.dtype}: must be {accepted}.")


def _checked_index(index: jax.Array, coarse_shape: tuple[int, ...]) -> jax.Array:
    """Returns `index` as int32 within [0, m); refuses what can be seen to be wrong."""
    batch, blocks = coarse_shape[:2]
    if index.ndim != 2 or index.shape[0] != batch or index.shape[1] > blocks:
        raise ValueError(f"index {index.shape}: must be [{batch}, k] with k <= {blocks} blocks.")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index is {index.dtype}: must be an integer type.")
    if not isinstance(index, jax.core.Tracer):
        values = np.sort(np.asarray(index), axis=1)
        if values.size and (values.min() < 0 or values.max() >= blocks):
            raise ValueError(
                f"index holds {values.min()} to {values.max()}: must be within [0, {blocks})."
            )
        if (values[:, 1:] == values[:, :-1]).any():
            raise ValueError("index names a block twice in an example: must be different blocks.")
    return jnp.clip(index.astype(jnp.int32), 0, blocks - 1)
