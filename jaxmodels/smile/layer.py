"""The MoE feed-forward as a linen module, and as a hook for the feed-forward of any trunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.core import layers
from jaxmodels.core.hooks import Hooks
from jaxmodels.smile import moe
from jaxmodels.smile.settings import MoeConfig

Initializer = Callable[..., jax.Array]
SOWN = "report"


class MoeMlp(nn.Module):
    """Mixture of experts in place of a feed-forward: [batch, length, d_model] -> the same shape.

    Parameters: `router` [d, E], or `router_inter` [d, n] and `router_intra` [d, m e] (per node:
    [n, d, m e]); `experts/wi` [E, d, f], `wo` [E, f, d], `bi` [E, f], `bo` [E, d], split over all
    devices. Their start does not depend on the mesh.

    Attributes:
      config: of the layer.
    """

    config: MoeConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, moe.Report]:
        """Runs the layer.

        A batch that the grid's cells do not divide is padded with masked tokens. Fewer tokens than
        cells (decoding), and `deterministic`: each device sees all of them.

        Args:
          x: [batch, length, d_model].
          mask: [batch, length], 1 on real tokens; the others give zero. Default: all are real.
          deterministic: evaluation: no jitter, and the evaluation's capacity factor; else an rng
            named "dropout" where there is jitter.

        Returns:
          y in x's type, zero for dropped and masked tokens: the residual stream carries them.
          what there is to report.

        Raises:
          ValueError: shapes that do not fit, or a mesh that does not divide the grid.
        """
        if x.ndim != 3 or (mask is not None and mask.shape != x.shape[:2]):
            raise ValueError(
                f"x {x.shape} and mask {getattr(mask, 'shape', None)}: [batch, length, d_model] "
                "and [batch, length] are needed."
            )
        config, params = self.config, self._params(x.shape[-1])
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        rng = None
        if config.jitter and not deterministic:
            rng = self.make_rng("dropout")

        def run(params: Any, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, moe.Report]:
            return moe.tokens(params, x, config, mask, deterministic=deterministic, rng=rng)

        if self.is_initializing():  # only shapes are wanted
            found = jax.eval_shape(run, params, x, mask)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
        return run(params, x, mask)

    def _params(self, d: int) -> dict[str, Any]:
        config = self.config
        e, f = config.num_experts, config.d_ff
        scaled = nn.initializers.variance_scaling(config.router_scale, "fan_in", "truncated_normal")
        params: dict[str, Any] = {}
        for name, shape in config.router_shapes(d).items():
            init = scaled if len(shape) == 2 else each(scaled)
            repeated = layers.partitioned(init, (None,) * len(shape))
            params[name] = self.param(name, repeated, shape, jnp.float32)
        expert = scaled
        if config.expert_std is not None:
            expert = nn.initializers.truncated_normal(config.expert_std)
        wanted = {
            "wi": ((e, d, f), ("expert", "embed", "mlp"), each(expert)),
            "wo": ((e, f, d), ("expert", "mlp", "embed"), each(expert)),
        }
        if config.use_bias:
            zeros = nn.initializers.zeros
            wanted["bi"] = ((e, f), ("expert", "mlp"), zeros)
            wanted["bo"] = ((e, d), ("expert", "embed"), zeros)
        params["experts"] = Experts(tuple(wanted.items()), name="experts")()
        return params


class Experts(nn.Module):
    """Holds the experts' parameters under one name; `wanted`: (name, (shape, axes, init))."""

    wanted: tuple[Any, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {
            name: self.param(name, layers.partitioned(init, axes), shape, jnp.float32)
            for name, (shape, axes, init) in self.wanted
        }


def each(init: Initializer) -> Initializer:
    """Returns an initialiser that draws every matrix of the leading axis by itself.

    The key is folded with the matrix's number, so an expert starts alike wherever it lives.
    """

    def stacked(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(shape[0]))
        return jax.vmap(lambda own: init(own, shape[1:], dtype))(keys)

    return stacked


class MoeHook(Hooks):
    """Puts a mixture of experts in the place of a trunk's feed-forward (`core.hooks`).

    A hook is not told which tokens are padding: they are routed like the others. What the layer
    reports is sown into "intermediates" as `report`, see `moe.Report`.

    Attributes:
      config: of the layer.
    """

    config: MoeConfig

    def setup(self) -> None:
        self.moe = MoeMlp(self.config)

    def sublayer(self, site: str, run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """See `Hooks.sublayer`."""
        if site != "ffn":
            return run(x)
        y, report = self.moe(x, deterministic=not self.has_rng("dropout"))
        self.sow("intermediates", SOWN, report, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return y
