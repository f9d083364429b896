"""Which implementation opens and closes blocks and attends: kernels where they run, else plain JAX.

The two agree in values and gradients. The kernels update the bank of differences in place, forward
and backward, and never hold scores of all pairs of rows.
"""

import dataclasses
from typing import Any

import jax

from jaxmodels.core import attention, partitioning
from jaxmodels.vcc import compression, rows
from jaxmodels.vcc.compression import State
from kernels_pallas import vip_compression
from kernels_pallas.weighted_attention import RelativeBias, weighted_attention

_PALLAS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}  # by platform; the same name in both


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Opening and closing blocks in plain JAX, with the gradients that jax finds."""

    def enter(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C [B, m, d] and D [B, m, b, d] of tokens [B, m, b, d], M [B, m, b]."""
        return compression.compress(tokens, mask)

    def open_blocks(self, state: State, index: jax.Array) -> tuple[jax.Array, State]:
        """Returns the tokens [B, k, b, d] of the blocks at `index` [B, k], and the state."""
        return compression.refine(state, index), state

    def write_back(self, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C and D with blocks closed: see `rows.close_blocks`."""
        return rows.close_blocks(*arrays)

    def leave(self, *arrays: jax.Array) -> jax.Array:
        """Returns the tokens of all blocks: see `compression.open_all`."""
        return compression.open_all(*arrays)


@dataclasses.dataclass(frozen=True)
class KernelBlocks(Blocks):
    """Opening and closing blocks with `kernels_pallas.vip_compression`.

    Attributes:
      backend: of its operations; None: that of the platform.
    """

    backend: str | None = None

    def _run(self, name: str, *arrays: jax.Array) -> Any:
        operation = getattr(vip_compression, name)
        return operation(*arrays, backend=self.backend, batch_axes=partitioning.AXES)

    def enter(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Blocks.enter`."""
        return self._run("enter", tokens, mask)

    def open_blocks(self, state: State, index: jax.Array) -> tuple[jax.Array, State]:
        """See `Blocks.open_blocks`; the state has to be used in place of the one given."""
        fine, *banks = self._run("open_blocks", state.coarse, state.difference, index)
        return fine, State(state.vip, *banks)

    def write_back(self, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Blocks.write_back`."""
        return self._run("write_back", *arrays)

    def leave(self, *arrays: jax.Array) -> jax.Array:
        """See `Blocks.leave`."""
        return self._run("leave", *arrays)


def blocks(choice: str, block_size: int, d_model: int) -> Blocks:
    """Returns what opens and closes blocks.

    Args:
      choice: `VccConfig.kernels`.
      block_size: b.
      d_model: d.

    Raises:
      ValueError: "pallas" where no kernel runs: on this platform, or for blocks of this size.
    """
    found, backend = _backend(choice)
    if not found:
        return Blocks()
    if backend is not None and not vip_compression.supports(backend, block_size, d_model):
        raise ValueError(
            f"model.kernels={choice!r}: blocks of model.block_size={block_size} tokens of width "
            f"model.d_model={d_model} do not fit the {backend} kernels, which want a width that is "
            "a multiple of 128 and, on TPU, blocks of a multiple of 8 (on GPU, at most 128); use "
            "'auto' or 'xla'."
        )
    return KernelBlocks(backend)


def attends(choice: str, implementation: str | None, drops: bool) -> bool:
    """Returns whether the rows attend by `kernels_pallas.weighted_attention`.

    Args:
      choice: `VccConfig.kernels`.
      implementation: of attention that the trunk asks for; None leaves it open.
      drops: attention weights are dropped, which no kernel does.

    Raises:
      ValueError: "pallas" where no kernel runs, or against another wish of the trunk.
    """
    found, _ = _backend(choice)
    if choice == "pallas" and implementation is not None:
        raise ValueError(
            f"model.kernels='pallas' and model.attention={implementation!r}: one attention is "
            "wanted; set model.attention to 'auto', or model.kernels to 'auto' or 'xla'."
        )
    if choice == "pallas" and drops:
        raise ValueError(
            "model.kernels='pallas': the kernels drop no attention weights; set "
            "model.attention_dropout_rate to 0, or model.kernels to 'auto' or 'xla'."
        )
    return found and implementation is None and not drops


def attend(
    choice: str,
    heads: tuple[jax.Array, jax.Array, jax.Array],
    key_bias: jax.Array,
    relative: RelativeBias | None = None,
) -> jax.Array:
    """Returns attention [B, r, h, dh] of queries, keys and values [B, r, h, dh] by the kernels.

    Args:
      choice: `VccConfig.kernels`, for which `attends` holds.
      heads: queries (scaled), keys and values.
      key_bias: [B, r] float32.
      relative: T5's bias by position.
    """
    _, backend = _backend(choice)
    return weighted_attention(
        *heads, key_bias, relative, implementation=backend, batch_axes=partitioning.AXES
    )


def _backend(choice: str) -> tuple[bool, str | None]:
    """Whether kernels are used on the platform that is traced for; which (None: they choose)."""
    platform = attention.platform()
    if choice == "interpret":
        return True, "interpret"
    if choice == "pallas":
        if platform not in _PALLAS:
            raise ValueError(
                f"model.kernels='pallas': there are kernels for TPU and GPU, and this is traced "
                f"for {platform!r}; use 'auto' or 'xla'."
            )
        return True, _PALLAS[platform]
    return choice == "auto" and platform in _PALLAS, None
