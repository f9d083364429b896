"""The models of the paper by name, and what they hold: parameters, active ones, router work.

The shapes reproduce the paper's headline sizes (section 15); 48B is reconstructed from its.
"""

import dataclasses

from jaxmodels.smile.grid import Grid


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A BERT-type encoder whose every second layer is a mixture of experts.

    Attributes:
      num_layers: L.
      d_model: d.
      d_ff: f, of the dense layers and of each expert.
      num_heads: attention heads.
      num_experts: E; 0: a dense model.
      grid: n nodes x m devices that routing is defined on.
      vocab_size: rows of the word table, tied to the output.
      max_positions: rows of the position table.
      num_token_types: rows of the token-type table.
    """

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_experts: int = 128
    grid: Grid = Grid(16, 8)
    vocab_size: int = 30522
    max_positions: int = 512
    num_token_types: int = 2

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers // 2 if self.num_experts else 0

    def router_columns(self, routing: str) -> int:
        """Returns E (one_level) or n + m e (bi_level): columns of the routers of a layer."""
        if routing == "one_level":
            return self.num_experts
        return self.grid.nodes + self.num_experts // self.grid.nodes

    def counts(self, routing: str) -> dict[str, int]:
        """Returns numbers of parameters by name.

        `total`; `encoder` without the output head; `experts`; `router_total`; `moe_layers`;
        `active`: what one token meets.
        """
        d, layers = self.d_model, self.num_layers
        expert = 2 * d * self.d_ff + self.d_ff + d
        attention = 4 * d * d + 4 * d + 2 * 2 * d  # and two norms
        rows = self.vocab_size + self.max_positions + self.num_token_types
        experts = self.moe_layers * self.num_experts * expert
        router = self.moe_layers * d * self.router_columns(routing) if self.moe_layers else 0
        dense = (layers - self.moe_layers) * expert
        encoder = rows * d + 2 * d + layers * attention + dense + experts + router
        total = encoder + d * d + 3 * d + self.vocab_size
        return {
            "total": total,
            "encoder": encoder,
            "experts": experts,
            "router_total": router,
            "moe_layers": self.moe_layers,
            "active": total - experts + self.moe_layers * expert,
        }

    def router_flops(self, routing: str) -> int:
        """Returns floating-point operations of the routers of one layer for one token."""
        return 2 * self.d_model * self.router_columns(routing)


SIZES = {
    "dense_110m": Sizes(12, 768, 3072, 12, num_experts=0),
    "smile_3_7b": Sizes(12, 768, 3072, 12),
    "smile_13b": Sizes(24, 1024, 4096, 16),
    "smile_48b": Sizes(36, 1600, 6400, 25),
    "debug": Sizes(4, 64, 128, 4, num_experts=8, grid=Grid(2, 4)),
}
