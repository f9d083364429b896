"""How a stack of layers compresses: the settings of VCC, whatever the trunk."""

import dataclasses

from jaxmodels.vcc import compression

KINDS = ("local", "vcc", "dense")
SELECTORS = ("attention", "random")
LAYOUTS = ("static", "gather")
KERNELS = ("auto", "pallas", "xla", "interpret")
OVERFLOWS = ("error", "warn", "demote")
VOTE_AVERAGES = ("slots", "vips")
CROSS_ATTENTIONS = ("tokens", "rows")


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
      kernels: what opens and closes blocks and attends: "auto", the kernels of `kernels_pallas` on
        the platforms that have them, plain JAX elsewhere (where attention weights are dropped or
        the trunk names its attention, that is plain too); "pallas", the kernels or an error; "xla",
        plain JAX; "interpret", the TPU kernels in Python, for tests. The numbers are the same.
      open_share: below 1, a layer opens blocks, best first, until they have this share of the VIPs'
        attention; k is then the most. Shapes stay: the slots that are left over hold padding.
      share_selection: so many layers in a row run on the blocks that the first of them chose, which
        stay open between them.
      cross_attention: of a decoder: to all "tokens", decompressed, or to the "rows" of the last
        layer (its open tokens, block means that count log(b) more, VIPs).
      question_apart: the first p tokens are the question (padded to p) and its slots, in segments
        of its own; what follows is the document, which then does not depend on the question: see
        `VccEncoder.encode_document`.
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
    kernels: str = "auto"
    overflow: str = "error"
    open_share: float = 1.0
    share_selection: int = 1
    cross_attention: str = "tokens"
    question_apart: bool = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            _one_of("kinds", kind, KINDS)
        _one_of("selector", self.selector, SELECTORS)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("overflow", self.overflow, OVERFLOWS)
        _one_of("vote_average", self.vote_average, VOTE_AVERAGES)
        _one_of("cross_attention", self.cross_attention, CROSS_ATTENTIONS)
        smallest = {"num_vip": 1, "block_size": 1, "num_fine_blocks": 0, "segment_length": 1}
        smallest["share_selection"] = 1
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least {least}.")
        if not 0.0 <= self.explore_prob <= 1.0:
            raise ValueError(f"model.explore_prob={self.explore_prob}: must be within [0, 1].")
        self._check_options()

    def _check_options(self) -> None:
        if not 0.0 < self.open_share <= 1.0:
            raise ValueError(f"model.open_share={self.open_share}: must be above 0, at most 1.")
        if self.adaptive and (self.layout != "static" or self.selector != "attention"):
            raise ValueError(
                f"model.open_share={self.open_share} needs model.layout='static' and "
                f"model.selector='attention', not {self.layout!r} and {self.selector!r}."
            )
        if self.cross_attention == "rows" and self.kinds[-1:] != ("vcc",):
            raise ValueError(
                f"model.cross_attention='rows' needs a VCC layer at the end, not {self.kinds[-1:]}."
            )
        vccs = self.kinds.count("vcc")
        if self.question_apart and (
            not vccs or self.kinds != layer_kinds(len(self.kinds) - vccs, vccs)
        ):
            raise ValueError(
                f"model.question_apart needs local layers first and VCC layers after them, not "
                f"{', '.join(self.kinds)}."
            )

    @property
    def adaptive(self) -> bool:
        """Whether a layer may open fewer blocks than k."""
        return self.open_share < 1.0

    def padded_length(self, n: int) -> int:
        """Returns the tokens that `n` are padded to: whole blocks, and a spare one if adaptive."""
        whole = compression.padded_length(n, self.num_vip, self.block_size)
        return whole + self.block_size * self.adaptive

    def compressed_length(self, n: int) -> int:
        """Returns r = p + k b + (m - k), the rows a VCC layer runs on for `n` tokens."""
        m = (self.padded_length(n) - self.num_vip) // self.block_size
        k = min(self.num_fine_blocks, m)
        return self.num_vip + k * self.block_size + m - k


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"model.{name}={value!r}: use one of {', '.join(accepted)}.")


def layer_kinds(num_local: int, num_vcc: int) -> tuple[str, ...]:
    """Returns the published arrangement: local layers first, VCC layers after them."""
    return ("local",) * num_local + ("vcc",) * num_vcc
