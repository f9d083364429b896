"""The MoE layer as one pure function over the whole grid, and the losses of what it reports."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.core import partitioning
from jaxmodels.smile import capacity_path, dropless, losses, replicated
from jaxmodels.smile import grid as grids
from jaxmodels.smile.settings import MoeConfig

Array = jax.Array
PATHS = {"one_level": capacity_path.one_level, "bi_level": capacity_path.bi_level}


@struct.dataclass
class Report:
    """What a layer reports beside its output.

    Attributes:
      levels: `losses.RouterSums` with leading axes [n, m], by router: "router", or "inter" (rows
        of each device) and "intra" (rows that arrived at each device).
      load: [n, m, e] float32, rows that each expert computed.
      overflow: [] float32, 1 where dropless buffers were too small and the safe path ran.
    """

    levels: dict[str, losses.RouterSums]
    load: Array
    overflow: Array

    @property
    def tokens(self) -> Array:
        """Valid tokens, float32 []."""
        first = "router" if "router" in self.levels else "inter"
        return self.levels[first].rows.sum()

    def balances(self, stats: str = "device") -> dict[str, Array]:
        """Returns the balance loss of each router, see `losses.balance_loss`."""
        return {name: losses.balance_loss(sums, stats) for name, sums in self.levels.items()}

    def dropped(self) -> dict[str, Array]:
        """Returns the share of the valid tokens lost at each level, and "total"."""
        tokens = jnp.maximum(self.tokens, 1)
        lost = {name: (s.rows - s.kept).sum() / tokens for name, s in self.levels.items()}
        return lost | {"total": sum(lost.values())}


def auxiliary_loss(report: Report, config: MoeConfig) -> Array:
    """Returns alpha * balance (+ beta * balance of the intra router) + z_coef * z, float32 []."""
    weights = {"router": config.alpha, "inter": config.alpha, "intra": config.beta}
    found = report.balances(config.stats)
    loss = sum(weights[name] * value for name, value in found.items())
    return loss + config.z_coef * sum(losses.z_loss(sums) for sums in report.levels.values())


def summary(report: Report, stats: str = "device") -> dict[str, Array]:
    """Returns what to watch, float32 [] by name.

    `balance_<router>`; `dropped_<level>` and `dropped_total`, shares of the tokens; `load_max`,
    the busiest expert's rows over the mean; `load_entropy`, 1 where all experts work alike;
    `overflow`.
    """
    load = report.load.reshape(-1)
    share = load / jnp.maximum(load.sum(), 1)
    entropy = -(share * jnp.log(jnp.maximum(share, 1e-30))).sum()
    found = {f"balance_{name}": value for name, value in report.balances(stats).items()}
    found |= {f"dropped_{name}": value for name, value in report.dropped().items()}
    return found | {
        "load_max": share.max() * load.size,
        "load_entropy": entropy / jnp.log(max(load.size, 2)),
        "overflow": report.overflow,
    }


def apply(
    params: Mapping[str, Any],
    x: Array,
    config: MoeConfig,
    mask: Array | None = None,
    *,
    deterministic: bool = True,
    rng: Array | None = None,
) -> tuple[Array, Report]:
    """Runs the layer on the tokens of every cell of the grid.

    Args:
      params: `router`, or `router_inter` and `router_intra`; `experts` with `wi` [E, d, f], `wo`
        [E, f, d] and, with biases, `bi` [E, f], `bo` [E, d]. Expert k of device j of node i is
        number (i m + j) e + k.
      x: [n, m, T, d], the tokens of every cell.
      config: of the layer.
      mask: [n, m, T], 1 on real tokens; the others give zero. Default: all are real.
      deterministic: evaluation: no jitter, and the evaluation's capacity factor.
      rng: for jitter; needed where `config.jitter` is not 0 and not deterministic.

    Returns:
      y [n, m, T, d] in x's type: gate times expert, zero for dropped and masked tokens.
      what there is to report.

    Raises:
      ValueError: shapes that do not fit the grid, or a mesh that does not.
    """
    y, report, _ = with_stages(params, x, config, mask, deterministic=deterministic, rng=rng)
    return y, report


def with_stages(
    params: Mapping[str, Any],
    x: Array,
    config: MoeConfig,
    mask: Array | None = None,
    *,
    deterministic: bool = True,
    rng: Array | None = None,
) -> tuple[Array, Report, dict[str, Any]]:
    """As `apply`, and the stages between by name with leading axes [n, m]; see `capacity_path`."""
    cells = config.grid
    if x.ndim != 4 or x.shape[:2] != (cells.nodes, cells.devices):
        raise ValueError(
            f"x has shape {x.shape}: [n, m, tokens, d] with n={cells.nodes}, m={cells.devices} is "
            "needed."
        )
    mask = jnp.ones(x.shape[:3], bool) if mask is None else mask.astype(bool)
    if x.shape[2] % config.chunks:
        raise ValueError(
            f"chunks={config.chunks} does not divide the {x.shape[2]} tokens of a device; choose a "
            "divisor, or 1."
        )
    transport = config.resolved_transport(not deterministic)
    routers = {name: params[name] for name in config.router_names}
    key = None if deterministic else rng
    if config.jitter and not deterministic and rng is None:
        raise ValueError("jitter needs an rng while training; give one, or set jitter=0.")
    resolved = dataclasses.replace(config, transport=transport)
    if transport == "ragged":
        path = dropless.run
    else:
        sizes = config.capacities(x.shape[2] // config.chunks, not deterministic)
        path = functools.partial(PATHS[config.routing], capacities=sizes)

    def cell(where: grids.Placement, repeated: Any, own: capacity_path.Cell) -> Any:
        def part(own: capacity_path.Cell, key: Array | None) -> Any:
            return path(where, repeated["routers"], own, resolved, key=key)

        return _chunked(part, own, repeated["key"], config.chunks)

    own = capacity_path.Cell(
        jnp.asarray(x, config.dtype), mask, _by_cell(params["experts"], config)
    )
    repeated = {"routers": routers, "key": key}
    checked = config.dispatch == "xla"  # a Pallas kernel does not say over which axes it varies
    y, sums, stages = grids.run(cell, cells, repeated, own, checked)
    # One level: every cell counts its sends to all experts. Bi-level: to those of its own node.
    load = sums.sent.sum((0, 1)) if sums.sent.ndim == 5 else sums.sent.sum(1)
    return y.astype(x.dtype), Report(sums.levels, load, sums.overflow.max()), stages


def _chunked(
    part: Callable[..., Any], own: capacity_path.Cell, key: Array | None, chunks: int
) -> Any:
    """Runs `part` on chunks of a cell's tokens, one after the other in the program's text.

    Nothing orders them, so that the compiler may run one's exchange beside another's experts.
    """
    if chunks == 1:
        return part(own, key)
    found = []
    for number, x, mask in zip(
        range(chunks), jnp.split(own.x, chunks), jnp.split(own.mask, chunks), strict=True
    ):
        mine = None if key is None else jax.random.fold_in(key, number)
        found.append(part(own.replace(x=x, mask=mask), mine)[:2])
    y, sums = zip(*found, strict=True)
    return jnp.concatenate(y), jax.tree.map(lambda *leaves: sum(leaves), *sums), {}


def _by_cell(experts: Mapping[str, Array], config: MoeConfig) -> dict[str, Array]:
    """[E, ...] -> [n, m, e, ...]."""
    lead = (config.grid.nodes, config.grid.devices, config.experts_per_device)
    return {name: leaf.reshape(*lead, *leaf.shape[1:]) for name, leaf in experts.items()}


def tokens(
    params: Mapping[str, Any],
    x: Array,
    config: MoeConfig,
    mask: Array,
    *,
    deterministic: bool = True,
    rng: Array | None = None,
) -> tuple[Array, Report]:
    """As `apply` for a batch [batch, length, d] and its mask [batch, length].

    Rows of the batch go to the cells in order; where the cells do not divide them, tokens do, with
    masked ones behind the last. Fewer tokens than cells, deterministic: `seen_by_all`.
    """
    cells, d, count = config.grid, x.shape[-1], x.shape[0] * x.shape[1]
    if deterministic and count < cells.size:
        y, report = seen_by_all(params, x.reshape(count, d), config, mask.reshape(count))
        return y.reshape(x.shape), report
    x = partitioning.constrain_batch(x)
    each = -(-count // (cells.size * config.chunks)) * config.chunks
    missing = each * cells.size - count
    flat = jnp.pad(x.reshape(count, d), ((0, missing), (0, 0)))
    valid = jnp.pad(mask.reshape(count), (0, missing))
    lead = (cells.nodes, cells.devices, each)
    y, report = apply(
        params,
        flat.reshape(*lead, d),
        config,
        valid.reshape(lead),
        deterministic=deterministic,
        rng=rng,
    )
    y = y.reshape(-1, d)[:count].reshape(x.shape)
    # Both ends are split by example: the partitioner must not look for another layout between.
    return partitioning.constrain_batch(y), report


def seen_by_all(
    params: Mapping[str, Any], x: Array, config: MoeConfig, mask: Array
) -> tuple[Array, Report]:
    """As `apply`, deterministic and dropless, for tokens [T, d] that every device sees."""
    repeated = {name: params[name] for name in config.router_names}
    repeated |= {"x": jnp.asarray(x, config.dtype), "mask": mask.astype(bool)}

    def cell(where: grids.Placement, repeated: Any, own: Any) -> Any:
        return replicated.run(where, repeated, own, config)

    own = _by_cell(params["experts"], config)
    y, levels, load = grids.run(cell, config.grid, repeated, own)
    one = jax.tree.map(lambda leaf: leaf[:1, :1], levels)  # the same on every cell
    return y.sum((0, 1)).astype(x.dtype), Report(one, load, jnp.float32(0))
