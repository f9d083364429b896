"""A structured start for small VCC encoders that have to learn look-up in minutes.

The architecture is untouched; only the random start is chosen. Some dimensions of the embedding
carry position (fixed-phase sinusoids), the others content. Local layers start as attention to near
neighbours (queries and keys equal, on the position dimensions), VCC and dense layers as content
matching (queries and keys equal, on the content dimensions), and every attention output starts as
a copy of what it attends to. From a plain random start the same model sits for more than a
thousand steps on the plateau of guessing among the values present.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jaxmodels.core import params as param_tree
from jaxmodels.trunks import bert


@dataclasses.dataclass(frozen=True)
class CopyingInit:
    """Strengths of the structured start.

    Attributes:
      position_dims: embedding dimensions that carry position.
      position_scale: size of the sinusoids beside word embeddings of unit size.
      local_sharpness: scale of local queries and keys on the position dimensions.
      content_sharpness: scale of other queries and keys on the content dimensions.
      local_copy: output gain of local layers.
      content_copy: output gain of the others.
      shortest_period: of the sinusoids, tokens.
      longest_period: of the sinusoids, tokens.
    """

    position_dims: int = 16
    position_scale: float = 1.0
    local_sharpness: float = 1.0
    content_sharpness: float = 1.0
    local_copy: float = 3.0
    content_copy: float = 1.0
    shortest_period: float = 16.0
    longest_period: float = 256.0


def sinusoids(rows: int, dims: int, shortest: float, longest: float) -> np.ndarray:
    """Returns [rows, dims] sines and cosines of geometrically spaced periods, in tokens."""
    periods = np.geomspace(shortest, longest, dims // 2)
    phase = 2 * np.pi * np.arange(rows)[:, None] / periods
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32)


def copying_params(
    rng: jax.Array,
    boxed: Any,
    kinds: tuple[str, ...],
    trunk: bert.BertConfig,
    init: CopyingInit | None = None,
) -> Any:
    """Returns the parameters of a trunk with the structured start written over.

    Args:
      rng: for the random parts.
      boxed: parameters of `VccRoberta` or `bert.BertModel`, boxed or not.
      kinds: of its layers; dense layers start like VCC layers.
      trunk: its sizes.
      init: strengths; default `CopyingInit()`.

    Raises:
      ValueError: the width leaves no dimension for content.
    """
    init = init or CopyingInit()
    d, waves = trunk.d_model, init.position_dims
    if waves >= d:
        raise ValueError(f"position_dims={waves} leaves no content in model.d_model={d}.")
    flat = param_tree.flatten(meta.unbox(boxed))
    rng_word, rng_heads = jax.random.split(rng)
    words = jax.random.normal(rng_word, (trunk.vocab_size, d - waves))
    flat["embeddings/word/embedding"] = jnp.pad(words, ((0, 0), (0, waves)))
    table = sinusoids(trunk.position_rows, waves, init.shortest_period, init.longest_period)
    flat["embeddings/position/embedding"] = jnp.pad(
        init.position_scale * jnp.asarray(table), ((0, 0), (d - waves, 0))
    )
    flat["embeddings/token_type/embedding"] *= 0.0
    for name in ("query", "key", "value", "out"):
        kernels = [
            _kernel(name, kind == "local", jax.random.fold_in(rng_heads, i), trunk, init)
            for i, kind in enumerate(kinds)
        ]
        flat[f"encoder/layers/attention/{name}/kernel"] = jnp.stack(kernels)
    return meta.replace_boxed(boxed, param_tree.unflatten(flat))


def _kernel(
    name: str, local: bool, rng: jax.Array, trunk: bert.BertConfig, init: CopyingInit
) -> jax.Array:
    """One projection [d, d] of one layer."""
    d = trunk.d_model
    content = d - init.position_dims
    rng_match, rng_value = jax.random.split(rng)
    if name in ("query", "key"):
        first, last = (content, d) if local else (0, content)
        sharpness = init.local_sharpness if local else init.content_sharpness
        match = _head_bases(rng_match, last - first, d // trunk.num_heads, trunk.num_heads)
        return jnp.zeros((d, d)).at[first:last].set(sharpness * match)
    value = jax.random.orthogonal(rng_value, d)
    return value if name == "value" else (init.local_copy if local else init.content_copy) * value.T


def _head_bases(rng: jax.Array, width: int, head_dim: int, num_heads: int) -> jax.Array:
    """Returns [width, num_heads * head_dim]: orthonormal directions, drawn anew for each head."""
    keys = jax.random.split(rng, num_heads)
    size = max(width, head_dim)
    bases = [jax.random.orthogonal(key, size)[:width, :head_dim] for key in keys]
    return jnp.concatenate(bases, axis=1)
