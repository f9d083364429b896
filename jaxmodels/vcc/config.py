"""How a stack of layers compresses: the settings of VCC, whatever the trunk."""

import dataclasses

from jaxmodels.vcc import compression

KINDS = ("local", "vcc", "dense")
SELECTORS = ("attention", "random")
LAYOUTS = ("static", "gather")
OVERFLOWS = ("error", "warn", "demote")
VOTE_AVERAGES = ("slots", "vips")


@dataclasses.dataclass(frozen=True)
class VccConfig:
    """How a stack of layers compresses.

    Attributes:
      kinds: one of "local", "vcc", "dense" a layer.
      num_vip: p, VIP slots.
      block_size: b, tokens a block.
      num_fine_blocks: k, blocks opened a layer; more than there are is all of them.
      segment_length: g, tokens a local segment.
      selector: "attention" (the layer's own) or "random".
      explore_prob: chance, a training example and layer, of a random order instead.
      scale_correction: coarse keys count log(b) more, for the b tokens they stand for.
      exact_counts: a partly padded block counts log(its real tokens) more instead; the official
        code counts b for it all the same.
      vote_average: the votes of the VIPs for a block are divided by the "slots" p, as in the
        official code, or by the "vips" that there are: with few VIPs in many slots the floor of
        1e-5 under the scores else flattens them.
      straight_through: selection learns through the gates (False only for ablation).
      layout: "static" keeps all m coarse rows and masks the opened ones; "gather" drops them
        (exact r = p + k b + m - k rows). The numbers are the same.
      overflow: what `inputs.check_inputs` does with more VIPs than slots.

    Raises:
      ValueError: a setting out of its range.
    """

    kinds: tuple[str, ...]
    num_vip: int = 320
    block_size: int = 16
    num_fine_blocks: int = 44
    segment_length: int = 512
    selector: str = "attention"
    explore_prob: float = 0.1
    scale_correction: bool = True
    exact_counts: bool = False
    vote_average: str = "slots"
    straight_through: bool = True
    layout: str = "static"
    overflow: str = "error"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            _one_of("kinds", kind, KINDS)
        _one_of("selector", self.selector, SELECTORS)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("overflow", self.overflow, OVERFLOWS)
        _one_of("vote_average", self.vote_average, VOTE_AVERAGES)
        smallest = {"num_vip": 1, "block_size": 1, "num_fine_blocks": 0, "segment_length": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least {least}.")
        if not 0.0 <= self.explore_prob <= 1.0:
            raise ValueError(f"model.explore_prob={self.explore_prob}: must be within [0, 1].")

    def compressed_length(self, n: int) -> int:
        """Returns r = p + k b + (m - k), the rows a VCC layer runs on for `n` tokens."""
        m = (compression.padded_length(n, self.num_vip, self.block_size) - self.num_vip) // (
            self.block_size
        )
        k = min(self.num_fine_blocks, m)
        return self.num_vip + k * self.block_size + m - k


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"model.{name}={value!r}: use one of {', '.join(accepted)}.")


def layer_kinds(num_local: int, num_vcc: int) -> tuple[str, ...]:
    """Returns the published arrangement: local layers first, VCC layers after them."""
    return ("local",) * num_local + ("vcc",) * num_vcc
