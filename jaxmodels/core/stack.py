"""A stack of transformer layers as one module: scanned over when whole, unrolled when decoding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import blocks, hooks, layers, partitioning
from jaxmodels.core.kv_cache import KVCache

INTERMEDIATES = "intermediates"


class Stack(nn.Module):
    """`num_layers` layers and, where wanted, a final norm.

    Parameters: `layers`, each leaf with a leading layer axis; `hooks_<start>` a group of hooks,
    stacked alike; `final_norm`. With `mutable=["intermediates"]` the residual stream before every
    layer and after the last is kept as "hidden" [num_layers + 1, B, L, d_model] (before the final
    norm), and what hooks sow as "hooks_<start>".

    Attributes:
      layer: unbound layer without hooks.
      num_layers: layers.
      layer_hooks: what a method changes, by groups of layers.
      final_norm: "", "layer" or "rms".
      dropout_rate: after the final norm while training.
      remat: remat policy of the layers, see `blocks.REMAT_POLICIES`.
    """

    layer: blocks.TransformerLayer
    num_layers: int
    layer_hooks: tuple[hooks.LayerHooks, ...] = ()
    final_norm: str = ""
    dropout_rate: float = 0.0
    remat: str = "none"

    def setup(self) -> None:
        d_model = self.layer.d_model
        # Layers run unbound over slices of one stacked tree: `parent=None` keeps them out of ours.
        plain = self.layer.clone(parent=None)
        init = blocks.stacked_init(plain, self.num_layers, d_model)
        stacked = self.param("layers", init)
        runs = []
        for start, stop, module in hooks.groups(self.layer_hooks, self.num_layers):
            layer, params = plain, blocks.layer_slice(stacked, start, stop)
            if module is not None:
                layer = plain.clone(hooks=module.clone(parent=None), parent=None)
                made = hooks_params(self, f"hooks_{start}", layer, stop - start)
                params = {**params, "hooks": made}
            runs.append((start, layer, params))
        self.runs = runs
        if self.final_norm:
            norm = layers.RMSNorm if self.final_norm == "rms" else layers.LayerNorm
            self.norm = norm(self.layer.norm_eps, name="final_norm")
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        deterministic: bool = True,
        *,
        positions: jax.Array | None = None,
        context: jax.Array | None = None,
        context_bias: jax.Array | None = None,
    ) -> jax.Array:
        """Runs all layers: see `blocks.TransformerLayer`; returns [B, L, d_model] float32."""
        given = {"positions": positions, "context": context, "context_bias": context_bias}
        keep = self.is_mutable_collection(INTERMEDIATES)
        rng = None if deterministic else self.make_rng("dropout")
        hidden = []
        for start, layer, params in self.runs:

            def body(
                params: Any, x: jax.Array, key: jax.Array | None, layer: nn.Module = layer
            ) -> tuple[jax.Array, Any]:
                rngs = None if key is None else {"dropout": key}
                y, sown = layer.apply(
                    {"params": params},
                    *(x, bias, key is None),
                    **given,
                    rngs=rngs,
                    mutable=[INTERMEDIATES] if keep else [],
                )
                return partitioning.constrain_batch(y), (x, sown) if keep else None

            key = rng if rng is None or start == 0 else jax.random.fold_in(rng, start)
            x, outputs = blocks.scan_layers(body, params, x, key, self.remat)
            if keep:
                hidden.append(outputs[0])
                if outputs[1]:
                    self.put_variable(INTERMEDIATES, f"hooks_{start}", outputs[1][INTERMEDIATES])
        if keep:
            self.put_variable(INTERMEDIATES, "hidden", jnp.concatenate([*hidden, x[None]]))
        return self._end(x, deterministic)

    def decode(
        self,
        x: jax.Array,
        caches: tuple[KVCache, ...],
        bias: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        contexts: tuple[KVCache, ...] | None = None,
        context_bias: jax.Array | None = None,
        layer_params: tuple[Any, ...] | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Runs all layers on the next tokens: [N, T, d_model] -> the same shape, and the caches.

        The layers are unrolled: a scan would copy every layer's weights and keys out of their
        stacks at every token, which costs more than the products themselves.

        Args: as `blocks.TransformerLayer.decode`, one cache and one context a layer; and
          layer_params: from `unstacked`, made once before the loop over tokens.
        """
        grown = []
        for i, (layer, params) in enumerate(self._each()):
            x, cache = layer.apply(
                {"params": params if layer_params is None else layer_params[i]},
                *(x, caches[i], bias),
                positions=positions,
                context=None if contexts is None else contexts[i],
                context_bias=context_bias,
                method="decode",
            )
            grown.append(cache)
        return self._end(x, True), tuple(grown)

    def prefill(
        self,
        x: jax.Array,
        max_length: int,
        bias: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Runs all layers on a whole prompt: [B, P, d_model] -> the same shape, and the caches.

        Unrolled as `decode` is: a scan would hold the keys of all layers twice.

        Args: as `blocks.TransformerLayer.prefill`.
        """
        caches = []
        for layer, params in self._each():
            x, cache = layer.apply(
                {"params": params}, x, max_length, bias, positions=positions, method="prefill"
            )
            caches.append(cache)
        return self._end(x, True), tuple(caches)

    def unstacked(self) -> tuple[Any, ...]:
        """Returns the parameters of each layer by itself, kernels in the type of the products.

        Held beside the stack while tokens are generated, so that no step copies a layer out of it.
        The layers' own kernels (not those of hooks) are made `layers.for_few_rows`.
        """

        def lay_out(tree: Any, own: bool = True) -> Any:
            if not isinstance(tree, Mapping):
                return tree
            laid = {name: lay_out(part, own and name != "hooks") for name, part in tree.items()}
            if "kernel" in laid:
                kernel = laid["kernel"].astype(self.layer.dtype)
                laid["kernel"] = layers.for_few_rows(kernel) if own else kernel
            return laid

        return tuple(lay_out(params) for _, params in self._each())

    def context_caches(self, context: jax.Array) -> tuple[KVCache, ...]:
        """Returns each layer's keys and values of a context [B, K, d_model]."""
        return tuple(
            layer.apply({"params": params}, context, method="context_cache")
            for layer, params in self._each()
        )

    def empty_caches(self, rows: int, max_length: int) -> tuple[KVCache, ...]:
        """Returns empty caches for `rows` sequences of at most `max_length` tokens."""
        layer = self.layer
        width = layer.head_dim or layer.d_model // layer.num_heads
        shape = (rows, layer.num_kv_heads or layer.num_heads, max_length, width)
        return tuple(KVCache.empty(shape, layer.dtype) for _ in range(self.num_layers))

    def _each(self) -> list[tuple[nn.Module, Any]]:
        return [
            (layer, jax.tree.map(lambda leaf, i=i: leaf[i], params))
            for _, layer, params in self.runs
            for i in range(jax.tree.leaves(params)[0].shape[0])
        ]

    def _end(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if self.final_norm:
            x = self.norm(x)
        return self.dropout(x, deterministic=deterministic)


def run_layers(
    layer: nn.Module,
    params: Any,
    x: jax.Array,
    bias: jax.Array | None = None,
    rng: jax.Array | None = None,
    policy: str = "none",
) -> jax.Array:
    """Runs layers without hooks over a slice of a stack's parameters.

    Args:
      layer: unbound.
      params: of the layers, stacked on a leading axis.
      x: [B, L, d_model].
      bias: broadcastable to [B, H, L, L].
      rng: for dropout; None drops nothing.
      policy: remat policy by name, see `blocks.REMAT_POLICIES`.

    Returns:
      [B, L, d_model] float32.
    """

    def body(one: Any, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
        rngs = None if key is None else {"dropout": key}
        y = layer.apply({"params": one}, x, bias, key is None, rngs=rngs)
        return partitioning.constrain_batch(y), None

    return blocks.scan_layers(body, params, x, rng, policy)[0]


def hooks_params(module: nn.Module, name: str, layer: nn.Module, count: int) -> Any:
    """Returns the parameters of a layer's hooks, stacked over `count` layers; from a setup.

    Args:
      module: whose parameter they are.
      name: of the parameter. Hooks without parameters need none: a published checkpoint fits.
      layer: unbound layer with its hooks.
      count: layers.
    """
    if not module.is_initializing() and not module.has_variable("params", name):
        return {}
    init = blocks.stacked_init(layer, count, layer.d_model)

    def only_hooks(rng: jax.Array) -> Any:
        return init(rng).get("hooks", {})

    return module.param(name, only_hooks)
