"""The parts of a Swin: a layer that attends within windows, merging of patches, a stage of layers.

Array axes: B images, h and w rows and columns of tokens, N = window * window tokens of a window.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.core import blocks, hooks, layers, partitioning, stack

# Between regions of a shifted image that are no neighbours; finite, as published.
REGION_BIAS = -100.0


@functools.lru_cache
def relative_position_index(window: int, table_window: int) -> np.ndarray:
    """Returns [N, N] int32: the row of the table of position biases for each query and key.

    The table has (2 table_window - 1)**2 rows, by differences in rows and columns. A smaller
    `window` reads the part of it that its own differences need.
    """
    row, column = np.divmod(np.arange(window * window), window)
    rows, columns = (x[:, None] - x[None, :] + table_window - 1 for x in (row, column))
    return (rows * (2 * table_window - 1) + columns).astype(np.int32)


@functools.lru_cache
def shift_bias(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Returns [windows, N, N] float32: 0 between tokens that were neighbours before the shift."""

    def region(size: int) -> np.ndarray:
        place = np.arange(size)
        return (place >= size - window).astype(int) + (place >= size - shift)

    regions = 3 * region(height)[:, None] + region(width)[None, :]
    regions = np.asarray(_windows_of(regions[None, ..., None], window))[..., 0]
    same = regions[:, :, None] == regions[:, None, :]
    return np.where(same, 0.0, REGION_BIAS).astype(np.float32)


def _windows_of(x: Any, window: int) -> Any:
    """Cuts [B, h, w, d] into windows [B * windows, N, d], row by row."""
    batch, height, width, d = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, d)


def _image_of(x: jax.Array, window: int, height: int, width: int) -> jax.Array:
    """Undoes `_windows_of`."""
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class SwinLayer(blocks.TransformerLayer):
    """A pre-norm layer whose attention stays within windows: [B, h * w, d_model] -> same shape.

    Hooks see the residual stream as the layer does, [B, h * w, d_model], row by row; inside
    attention (its projections, keys and values) they see windows, [B * windows, N, ...]. The bias
    that comes with keys and values is [1 or B * windows, heads, N, N].

    Attributes (beside those of `blocks.TransformerLayer`):
      window: side of a window in tokens; the table of position biases is made for it.
      resolution: (h, w); one that windows do not divide is padded with zeros behind the norm.
      shifted: windows are moved by half a side down and to the right.
      drop_path_rate: share of the branches dropped while training, image by image; a number, or
        a scalar array where layers share a program.
    """

    window: int = 7
    resolution: tuple[int, int] = (1, 1)
    shifted: bool = False
    drop_path_rate: Any = 0.0

    def setup(self) -> None:
        super().setup()
        init = layers.partitioned(layers.normal(0.02), (None, "heads"))
        shape = ((2 * self.window - 1) ** 2, self.num_heads)
        self.relative_position_bias = self.param("relative_position_bias", init, shape, jnp.float32)

    def drop(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns a branch after dropout and drop path, in float32."""
        x, rate = super().drop(x, deterministic), self.drop_path_rate
        if deterministic or (isinstance(rate, float) and not rate):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (x.shape[0], 1, 1))
        return jnp.where(kept, x / (1 - rate), 0.0)

    def attend(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Attention within the windows of the image: [B, h * w, d_model] -> the same shape."""
        height, width = self.resolution
        window, shift = min(self.window, *self.resolution), 0
        if self.shifted and min(self.resolution) > self.window:
            shift = window // 2
        down, right = -height % window, -width % window
        x = x.reshape(-1, height, width, self.d_model)
        x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
        tall, wide = height + down, width + right
        if shift:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        bias = self._bias(window, shift, tall, wide, x.shape[0])
        x = self.attention(_windows_of(x, window), bias, None, deterministic)
        x = _image_of(x, window, tall, wide)
        if shift:
            x = jnp.roll(x, (shift, shift), (1, 2))
        return x[:, :height, :width].reshape(-1, height * width, self.d_model)

    def _bias(self, window: int, shift: int, tall: int, wide: int, batch: int) -> jax.Array:
        tokens = window * window
        index = relative_position_index(window, self.window).reshape(-1)
        bias = jnp.take(self.relative_position_bias, index, axis=0)
        bias = bias.reshape(tokens, tokens, -1).transpose(2, 0, 1)[None]
        if not shift:
            return bias
        bias = bias + shift_bias(tall, wide, window, shift)[:, None]
        return jnp.broadcast_to(bias, (batch, *bias.shape)).reshape(-1, *bias.shape[1:])

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Runs one layer: [B, h * w, d_model] -> the same shape."""
        if x.shape[1] != self.resolution[0] * self.resolution[1]:
            raise ValueError(
                f"{x.shape[1]} tokens for a resolution of {self.resolution}; give one a place."
            )

        def attend(x: jax.Array) -> jax.Array:
            return self.attend(x, deterministic)

        return self._run(x, attend, attend, deterministic)


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens: [B, h, w, d] -> [B, ceil(h / 2), ceil(w / 2), 2 d] float32.

    They lie in the order (even, even), (odd, even), (even, odd), (odd, odd) of (row, column); an
    odd side gets a line of zeros.

    Attributes:
      norm_eps: of the layer norm over the joined tokens.
      dtype: of the matrix product.
    """

    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
        x = layers.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        axes = ("mlp", "embed")
        x = layers.Dense(2 * d, axes, use_bias=False, dtype=self.dtype, name="reduction")(x)
        return x.astype(jnp.float32)


def _runs(owners: tuple[int | None, ...]) -> list[tuple[int, int, int]]:
    """Returns (first layer, steps, layers a step): pairs of plain and shifted layer, and a rest.

    All pairs of a run have the same hooks, so that one scan runs them.
    """
    pairs = [owners[i : i + 2] for i in range(0, len(owners), 2)]
    found, start = [], 0
    for pair, run in itertools.groupby(pairs):
        steps = len(list(run))
        found.append((start, steps, len(pair)))
        start += steps * len(pair)
    return found


class SwinStage(nn.Module):
    """Layers of one width, then a merging of patches: [B, h, w, d] -> [B, h', w', d'] float32.

    Parameters: `layers`, each leaf with a leading layer axis; `hooks_<first layer>` a group of
    hooks, stacked alike over the layers that it has in this stage; `downsample`. With
    `mutable=["intermediates"]`, "hidden" [layers + 1, B, h * w, d] and what hooks sow, as in
    `stack.Stack`.

    Attributes:
      layer: unbound layer without hooks.
      owners: for each layer of the stage the number of its hooks, or None.
      layer_hooks: what a method changes.
      drop_path_rates: of each layer; none: nothing is dropped.
      merge: ends in a merging of patches.
      remat: remat policy of the layers.
    """

    layer: SwinLayer
    owners: tuple[int | None, ...]
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()
    drop_path_rates: tuple[float, ...] = ()
    merge: bool = False
    remat: str = "none"

    def setup(self) -> None:
        plain, depth = self.layer.clone(parent=None), len(self.owners)
        self.stacked = self.param("layers", blocks.stacked_init(plain, depth, plain.d_model))
        made = {}
        for owner in dict.fromkeys(self.owners):
            if owner is not None:
                layer, count = self._layer(owner), self.owners.count(owner)
                made[self._name(owner)] = stack.hooks_params(self, self._name(owner), layer, count)
        self.made = made
        if self.merge:
            self.downsample = PatchMerging(plain.norm_eps, plain.dtype)

    def _name(self, owner: int | None) -> str:
        return f"hooks_{self.owners.index(owner)}"

    def _layer(self, owner: int | None, **changes: Any) -> SwinLayer:
        module = None if owner is None else self.layer_hooks[owner].hooks.clone(parent=None)
        return self.layer.clone(hooks=module, parent=None, **changes)

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Runs the stage."""
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height * width, -1)
        keep = self.is_mutable_collection(stack.INTERMEDIATES)
        rng = None if deterministic else self.make_rng("dropout")
        hidden, sown = [], {}
        for start, steps, size in _runs(self.owners):
            owners = self.owners[start : start + size]
            unbound = [
                self._layer(owner, resolution=(height, width), shifted=j == 1)
                for j, owner in enumerate(owners)
            ]

            def body(
                xs: Any, x: jax.Array, key: jax.Array | None, unbound: Any = unbound
            ) -> tuple[jax.Array, Any]:
                kept = []
                for j, (layer, (params, rate)) in enumerate(zip(unbound, _each(xs), strict=True)):
                    layer = layer if rate is None else layer.clone(drop_path_rate=rate)
                    rngs = None if key is None else {"dropout": jax.random.fold_in(key, j)}
                    y, more = layer.apply(
                        {"params": params},
                        *(x, key is None),
                        rngs=rngs,
                        mutable=[stack.INTERMEDIATES] if keep else [],
                    )
                    kept.append((x, more.get(stack.INTERMEDIATES)))
                    x = partitioning.constrain_batch(y)
                return x, kept if keep else None

            key = rng if rng is None or start == 0 else jax.random.fold_in(rng, start)
            xs = self._params(start, steps, owners)
            x, outputs = blocks.scan_layers(body, xs, x, key, self.remat)
            if keep:
                hidden.append(_in_order([before for before, _ in outputs]))
                for owner in set(owners) - {None}:
                    of = [made for (_, made), o in zip(outputs, owners, strict=True) if o == owner]
                    if of[0]:
                        sown.setdefault(self._name(owner), []).append(_in_order(of))
        if keep:
            self.put_variable(stack.INTERMEDIATES, "hidden", jnp.concatenate([*hidden, x[None]]))
            for name, parts in sown.items():
                whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
                self.put_variable(stack.INTERMEDIATES, name, whole)
        x = x.reshape(batch, height, width, -1)
        return self.downsample(x) if self.merge else x

    def _params(self, start: int, steps: int, owners: tuple[int | None, ...]) -> Any:
        """Returns a run's layers [steps, layers a step, ...], its hooks by place, its rates."""
        size = len(owners)

        def cut(leaf: jax.Array) -> jax.Array:
            part = leaf[start : start + steps * size]
            return part.reshape(steps, size, *leaf.shape[1:])

        hooked = []
        for j, owner in enumerate(owners):
            if owner is None:
                hooked.append({})
                continue
            first, stride = self.owners[: start + j].count(owner), owners.count(owner)
            part = slice(first, first + stride * (steps - 1) + 1, stride)
            made = self.made[self._name(owner)]
            hooked.append(jax.tree.map(lambda leaf, part=part: leaf[part], dict(made)))
        rates = jnp.asarray(self.drop_path_rates, jnp.float32) if self.drop_path_rates else None
        return jax.tree.map(cut, self.stacked), hooked, None if rates is None else cut(rates)


def _each(xs: Any) -> Iterator[tuple[Any, jax.Array | None]]:
    """Yields parameters and drop path rate of each layer of a step, see `SwinStage._params`."""
    stacked, hooked, rates = xs
    for j, own in enumerate(hooked):
        params = jax.tree.map(lambda leaf, j=j: leaf[j], stacked)
        yield {**params, "hooks": own} if own else params, None if rates is None else rates[j]


def _in_order(trees: list[Any]) -> Any:
    """Joins what the layers of each step gave, [steps, ...] each, in the order of the layers."""

    def join(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(join, *trees)
