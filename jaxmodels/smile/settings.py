"""Settings of an MoE layer, checked when they are made."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxmodels.core import layers
from jaxmodels.smile import routing
from jaxmodels.smile.grid import Grid, mesh_sizes
from kernels_pallas import expert_dispatch

ROUTINGS = ("one_level", "bi_level")
TRANSPORTS = ("auto", "flat", "two_hop", "ragged")
ROUTERS = ("shared", "per_node")
STATS = ("device", "device_mean", "global")


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """An MoE layer: where tokens go (routing), how they get there (transport), and its losses.

    Attributes:
      num_experts: E; a multiple of the grid's cells.
      d_ff: f, inner width of an expert.
      grid: n nodes x m devices that routing is defined on.
      routing: "one_level" (Switch) or "bi_level" (SMILE).
      transport: "flat": one exchange over all devices; "two_hop": inside the node, then between
        nodes; "ragged": dropless, without capacities; "auto": by the mesh, see
        `resolved_transport`.
      capacity_factor: of each level while training; None: dropless.
      eval_capacity_factor: the same without training.
      capacity_factor_intra: of the second level where it differs, while training and without.
      min_capacity: slots of a bucket at least.
      capacity_multiple: capacities are rounded up to a multiple of it.
      buffer_factor: rows of a dropless buffer, relative to the tokens of a device; where they are
        too few, a slower path takes over and nothing is lost.
      intra_router: "shared" by all nodes, or "per_node".
      jitter: eps of the noise on the routers' input while training; 0: none.
      stats: the rows a balance loss is taken over, see `losses.balance_loss`.
      alpha: weight of the balance loss (bi-level: of the inter router).
      beta: weight of the intra router's balance loss.
      z_coef: weight of the router z-loss.
      activation: of the experts, see `core.layers.ACTIVATIONS`.
      use_bias: the experts have biases.
      chunks: parts that the tokens of a device are cut into, so that the exchange of one may run
        beside the experts of another; each has capacities of its own.
      remat: the backward pass computes the experts' inner values again.
      router_scale: s of the routers' truncated normal start, std sqrt(s / d).
      expert_std: std of the experts' truncated normal start; None: as the routers, by fan-in.
      dispatch: what moves rows into slots and back, see `kernels_pallas.expert_dispatch`: "xla",
        "mosaic" (TPU), or None, by the platform.
      dtype: of the experts' products and of the buffers that travel.

    Raises:
      ValueError: settings that do not fit together.
    """

    num_experts: int
    d_ff: int
    grid: Grid = Grid()
    routing: str = "bi_level"
    transport: str = "auto"
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = 2.0
    capacity_factor_intra: float | None = None
    min_capacity: int = 1
    capacity_multiple: int = 1
    buffer_factor: float = 2.0
    intra_router: str = "shared"
    jitter: float = 0.0
    stats: str = "device"
    alpha: float = 0.01
    beta: float = 0.01
    z_coef: float = 0.0
    activation: str = "gelu"
    use_bias: bool = True
    chunks: int = 1
    remat: bool = False
    router_scale: float = 0.1
    expert_std: float | None = None
    dispatch: str | None = "xla"
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name, known in (
            ("dispatch", (None, *expert_dispatch.IMPLEMENTATIONS)),
            ("routing", ROUTINGS),
            ("transport", TRANSPORTS),
            ("intra_router", ROUTERS),
            ("stats", STATS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {known}.")
        for name in ("d_ff", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        layers.activation(self.activation)
        self.grid.experts_per_device(self.num_experts)
        for name in ("capacity_factor", "eval_capacity_factor", "capacity_factor_intra"):
            if getattr(self, name) is not None:
                routing.capacity(1, 1, getattr(self, name), self.min_capacity)
        if not (0 <= self.jitter < 1):
            raise ValueError(f"jitter={self.jitter}: accepted are 0 to below 1.")
        if not (self.buffer_factor > 0 and math.isfinite(self.buffer_factor)):
            raise ValueError(f"buffer_factor={self.buffer_factor}: must be a positive number.")
        self._check_transport()

    def _check_transport(self) -> None:
        if self.routing == "bi_level" and self.transport == "flat":
            raise ValueError(
                "routing='bi_level' has an exchange of its own at each level: transport='flat' "
                "does not exist for it; use 'two_hop', 'ragged' or 'auto'."
            )
        factors = (self.capacity_factor, self.eval_capacity_factor)
        if self.transport in ("flat", "two_hop") and None in factors:
            raise ValueError(
                f"capacity_factor={factors[0]}, eval_capacity_factor={factors[1]}: None means "
                f"dropless, which transport={self.transport!r} is not; use 'ragged' or 'auto'."
            )

    @property
    def experts_per_device(self) -> int:
        """e."""
        return self.grid.experts_per_device(self.num_experts)

    @property
    def experts_per_node(self) -> int:
        """m e, the buckets of the intra router."""
        return self.grid.devices * self.experts_per_device

    @property
    def router_names(self) -> tuple[str, ...]:
        """Names of the routers' kernels."""
        return ("router",) if self.routing == "one_level" else ("router_inter", "router_intra")

    def router_shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the routers' kernels by name."""
        if self.routing == "one_level":
            return {"router": (d_model, self.num_experts)}
        intra: tuple[int, ...] = (d_model, self.experts_per_node)
        if self.intra_router == "per_node":
            intra = (self.grid.nodes, *intra)
        return {"router_inter": (d_model, self.grid.nodes), "router_intra": intra}

    def resolved_transport(self, training: bool = True) -> str:
        """Returns "flat", "two_hop" or "ragged": the transport on the mesh in scope.

        "auto" takes two hops where the mesh has more than one node (the slow dimension: slices,
        hosts) and nodes of more than one device; inside one node a flat exchange is at least as
        fast. Bi-level routing always takes two.
        """
        return self.explained_transport(training)[0]

    def explained_transport(self, training: bool = True) -> tuple[str, str]:
        """Returns `resolved_transport`, and the reason for it in words."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if self.transport != "auto":
            return self.transport, "as set"
        if factor is None:
            return "ragged", "auto: no capacity factor, so nothing may be dropped"
        if self.routing == "bi_level":
            return "two_hop", "auto: bi-level routing has an exchange at each level"
        nodes, devices = mesh_sizes()
        if nodes > 1 and devices > 1:
            why = f"{nodes} nodes of {devices} devices: fewer messages go from node to node"
            return "two_hop", f"auto: the mesh has {why}"
        if nodes > 1:
            return "flat", "auto: nodes of one device have nothing to exchange inside"
        return "flat", "auto: inside one node one exchange is at least as fast as two"

    def capacities(self, tokens: int, training: bool = True) -> tuple[int, ...]:
        """Returns (C,) or (C1, C2) for that many tokens a device; both relative to the tokens."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        rounding = (self.min_capacity, self.capacity_multiple)
        if self.routing == "one_level":
            return (routing.capacity(tokens, self.num_experts, factor, *rounding),)
        second = factor if self.capacity_factor_intra is None else self.capacity_factor_intra
        return (
            routing.capacity(tokens, self.grid.nodes, factor, *rounding),
            routing.capacity(tokens, self.experts_per_node, second, *rounding),
        )
