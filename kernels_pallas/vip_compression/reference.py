"""Opening and closing blocks in plain JAX: the definition that every kernel is tested against.

A sequence is held as block means C [B, m, d] and a bank of differences D [B, m, b, d]; token i of
block j is C[j] - D[j, i]. A layer opens k blocks, changes their tokens F [B, k, b, d], and closes
them again. `compress`, `decompress` and their gradients are written for [..., b, d] so that the
kernels run these very functions on one block at a time.

Symbols: B batch, m blocks, b tokens a block, k blocks opened, d width, M mask (1 on real tokens).
"""

import jax
import jax.numpy as jnp

MEAN_EPS = 1e-4  # the published mean divides by count + 1e-4


def compress(fine: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and differences in float32: c = sum_i(f_i M_i) / (count + 1e-4), D_i = c - f_i M_i.

    Args:
      fine: [..., b, d] token states.
      mask: [..., b, 1], 1 on real tokens.

    Returns:
      c [..., 1, d] and D [..., b, d]; masked rows hold D_i = c, which reads back as 0.
    """
    mask = mask.astype(jnp.float32)
    masked = fine.astype(jnp.float32) * mask
    count = mask.sum(axis=-2, keepdims=True)
    mean = masked.sum(axis=-2, keepdims=True) / (count + MEAN_EPS)
    return mean, mean - masked


def compress_gradient(
    coarse_bar: jax.Array, difference_bar: jax.Array, mask: jax.Array
) -> jax.Array:
    """Gradient of `compress`: M_i * ((gc + sum_j gD_j) / (count + 1e-4) - gD_i), float32.

    Args:
      coarse_bar: [..., 1, d] cotangent of c.
      difference_bar: [..., b, d] cotangent of D.
      mask: [..., b, 1].

    Returns:
      [..., b, d] cotangent of the tokens.
    """
    mask = mask.astype(jnp.float32)
    difference_bar = difference_bar.astype(jnp.float32)
    total = coarse_bar.astype(jnp.float32) + difference_bar.sum(axis=-2, keepdims=True)
    count = mask.sum(axis=-2, keepdims=True)
    return mask * (total / (count + MEAN_EPS) - difference_bar)


def decompress(coarse: jax.Array, difference: jax.Array) -> jax.Array:
    """Token states in float32: C [..., 1, d] - D [..., b, d] -> [..., b, d]."""
    return coarse.astype(jnp.float32) - difference.astype(jnp.float32)


def token_dtype(coarse: jax.Array, difference: jax.Array) -> jnp.dtype:
    """Returns the dtype of tokens that are read from these banks: the wider of the two."""
    return jnp.promote_types(coarse.dtype, difference.dtype)


def refine(coarse: jax.Array, difference: jax.Array, index: jax.Array) -> jax.Array:
    """Opens blocks: C [B, m, d], D [B, m, b, d], index [B, k] -> F = C - D there, [B, k, b, d]."""
    opened = decompress(take(coarse, index)[:, :, None], take(difference, index))
    return opened.astype(token_dtype(coarse, difference))


def write_back(
    coarse: jax.Array, difference: jax.Array, index: jax.Array, fine: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Closes blocks: C and D with the mean and the differences of F at index.

    Args:
      coarse: C [B, m, d].
      difference: D [B, m, b, d].
      index: [B, k] int; those of one example differ.
      fine: F [B, k, b, d], the tokens of these blocks.
      mask: [B, k, b], 1 on real tokens.

    Returns:
      C' and D' in the dtypes of C and D; other blocks are as they were.
    """
    mean, change = compress(fine, mask[..., None])
    return put(coarse, index, mean[:, :, 0]), put(difference, index, change)


def refine_gradient(
    coarse_bar: jax.Array, difference_bar: jax.Array, index: jax.Array, fine_bar: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradient of `refine`, added to cotangents of the banks: gC + sum_i gF_i and gD - gF at index.

    Args:
      coarse_bar: gC [B, m, d].
      difference_bar: gD [B, m, b, d].
      index: [B, k].
      fine_bar: gF [B, k, b, d].

    Returns:
      gC and gD.
    """
    fine_bar = fine_bar.astype(jnp.float32)
    rows = take(coarse_bar, index).astype(jnp.float32) + fine_bar.sum(axis=2)
    change = take(difference_bar, index).astype(jnp.float32) - fine_bar
    rows, change, coarse_bar, difference_bar = _read((rows, change, coarse_bar, difference_bar))
    return put(coarse_bar, index, rows), put(difference_bar, index, change)


def write_back_gradient(
    coarse_bar: jax.Array,
    difference_bar: jax.Array,
    index: jax.Array,
    mask: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradient of `write_back`: what reaches F, and the banks' cotangents with 0 at index.

    Args:
      coarse_bar: gC' [B, m, d].
      difference_bar: gD' [B, m, b, d].
      index: [B, k].
      mask: [B, k, b].
      dtype: of gF.

    Returns:
      gC, gD, and gF [B, k, b, d].
    """
    opened = take(difference_bar, index)
    fine_bar = compress_gradient(take(coarse_bar, index)[:, :, None], opened, mask[..., None])
    fine_bar, coarse_bar, difference_bar = _read((fine_bar, coarse_bar, difference_bar))
    coarse_bar = put(coarse_bar, index, jnp.zeros(opened.shape[:2] + opened.shape[3:]))
    difference_bar = put(difference_bar, index, jnp.zeros(opened.shape))
    return coarse_bar, difference_bar, fine_bar.astype(dtype)


def enter(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compresses every block: [B, m, b, d], M [B, m, b] -> C [B, m, d], D [B, m, b, d]."""
    mean, change = compress(tokens, mask[..., None])
    return mean[:, :, 0].astype(tokens.dtype), change.astype(tokens.dtype)


def leave(coarse: jax.Array, difference: jax.Array, mask: jax.Array) -> jax.Array:
    """Opens every block for good: (C - D) * M, [B, m, b, d]; padding becomes exactly 0."""
    tokens = decompress(coarse[:, :, None], difference) * mask.astype(jnp.float32)[..., None]
    return tokens.astype(token_dtype(coarse, difference))


def enter_gradient(coarse_bar: jax.Array, difference_bar: jax.Array, mask: jax.Array) -> jax.Array:
    """Gradient of `enter`: what reaches the tokens, [B, m, b, d] in the dtype of gD."""
    tokens_bar = compress_gradient(coarse_bar[:, :, None], difference_bar, mask[..., None])
    return tokens_bar.astype(difference_bar.dtype)


def leave_gradient(
    tokens_bar: jax.Array, mask: jax.Array, dtypes: tuple[jnp.dtype, jnp.dtype]
) -> tuple[jax.Array, jax.Array]:
    """Gradient of `leave`: gC = sum_i g_i M_i and gD = -g M, in `dtypes`."""
    masked = tokens_bar.astype(jnp.float32) * mask.astype(jnp.float32)[..., None]
    return masked.sum(axis=2).astype(dtypes[0]), -masked.astype(dtypes[1])


def take(bank: jax.Array, index: jax.Array) -> jax.Array:
    """Returns bank[i, index[i]]: [B, m, ...], [B, k] -> [B, k, ...]."""
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="promise_in_bounds"))(bank, index)


def put(bank: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns `bank` with bank[i, index[i]] = rows[i], cast to its dtype."""

    def one(bank: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
        return bank.at[index].set(rows, mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(one)(bank, index, rows.astype(bank.dtype))


def _read(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """`arrays`, the first of them computed before the rest of them, the banks, may be overwritten.

    Left alone, XLA for GPUs reads the old bank late, out of a copy of it.
    """
    return jax.lax.optimization_barrier(arrays)
