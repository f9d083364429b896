"""Tables of foreign names: what each foreign tensor is called, and the leaf of ours it becomes."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Container, Iterable, Iterator, Sequence

from jaxmodels.weights.tensor_file import WeightsError
from jaxmodels.weights.transforms import IDENTITY, TRANSPOSE, Part, Shape, Transform


@dataclasses.dataclass(frozen=True)
class Rule:
    """One foreign tensor (or one per layer), or a part of one, and the leaf it becomes.

    Attributes:
      source: foreign key; `{i}` stands for the layer, stacked over our leaf's leading axis.
      target: path of our leaf, joined by "/".
      transform: layout change from one foreign tensor to (one layer of) our leaf.
      optional: our leaf may be absent: from the model although the file has the tensor, and from
        the file where the tree is built from the file alone (`import_tree`).
      aliases: other foreign keys of the same tensor (tied): any is read, all present ones must be
        equal. Not written: their library ties them by itself, and files hold a tensor once.
      copies: those of `aliases` that are written all the same, where nobody ties them.
      fallbacks: foreign keys read when `source` and its aliases are absent; never written. A tensor
        equal to what is written under its fallback is left out, to be read from there again.
      part: our leaf is this piece of the foreign tensor (before `transform`); the other pieces
        have rules of their own with the same source.
      layers: foreign index of each layer of our stack; None: 0, 1, 2, ...
    """

    source: str
    target: str
    transform: Transform = IDENTITY
    optional: bool = False
    aliases: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    part: Part | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks that all foreign keys are stacked, or none."""
        counts = {key.count("{i}") for key in self.keys}
        if counts not in ({0}, {1}):
            raise WeightsError(
                f"rule for {self.target!r}: {{i}} must occur once in every key or never."
            )
        if not set(self.copies) <= set(self.aliases):
            raise WeightsError(
                f"rule for {self.target!r}: copies={self.copies} must be among its aliases."
            )
        if self.layers is not None and (
            not self.stacked or not self.layers or len(set(self.layers)) != len(self.layers)
        ):
            raise WeightsError(
                f"rule for {self.target!r}: layers={self.layers} needs {{i}} in its keys, and "
                "each foreign layer once."
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """All foreign keys that the rule may read."""
        return (self.source, *self.aliases, *self.fallbacks)

    @property
    def stacked(self) -> bool:
        """Whether our leaf holds one foreign tensor per layer."""
        return "{i}" in self.source

    def foreign_layers(self, depth: int) -> Sequence[int]:
        """Returns the foreign index of each of our `depth` layers ([0] where not stacked)."""
        return self.layers or range(depth if self.stacked else 1)

    def source_shape(self, shape: Shape) -> Shape:
        """Returns the foreign tensor's shape for (a layer of) our leaf of `shape`; ValueError."""
        shape = tuple(self.transform.source_shape(shape))
        return self.part.packed_shape(shape) if self.part else shape

    def target_shape(self, shape: Shape) -> Shape:
        """Returns the shape of (a layer of) our leaf for a foreign tensor's shape; ValueError."""
        shape = self.part.piece_shape(shape) if self.part else shape
        return tuple(self.transform.target_shape(shape))


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Foreign keys that hold no parameter of ours: `{i}` is a number, `*` any text."""

    pattern: str


Rules = Sequence[Rule | Ignore]


def dense(source: str, target: str, bias: bool = True, **options: object) -> list[Rule]:
    """Returns the rules of a PyTorch Linear: weight [out, in] -> kernel [in, out], and bias.

    Args:
      source: foreign module, `encoder.layer.{i}.output.dense`.
      target: our module, `encoder/layers/ffn/wo`.
      bias: whether it has one.
      **options: further fields of `Rule`.
    """
    rules = [Rule(f"{source}.weight", f"{target}/kernel", TRANSPOSE, **options)]
    return rules + ([Rule(f"{source}.bias", f"{target}/bias", **options)] if bias else [])


def norm(source: str, target: str, bias: bool = True, **options: object) -> list[Rule]:
    """Returns the rules of a layer norm (`bias=False`: of an RMS norm): weight -> scale."""
    rules = [Rule(f"{source}.weight", f"{target}/scale", **options)]
    return rules + ([Rule(f"{source}.bias", f"{target}/bias", **options)] if bias else [])


def packed(
    source: str,
    targets: Sequence[str],
    transform: Transform = IDENTITY,
    axis: int = 0,
    shares: Sequence[int] | None = None,
    layers: tuple[int, ...] | None = None,
) -> list[Rule]:
    """Returns one rule a leaf for leaves that lie side by side in one foreign tensor.

    Args:
      source: foreign key, `h.{i}.attn.c_attn.weight`.
      targets: our leaves in the order in which they lie in it.
      transform: of each piece, after it is cut out.
      axis: of the foreign tensor, along which the pieces lie.
      shares: relative sizes of the pieces; None: equal.
      layers: as in `Rule`.
    """
    sizes = tuple(shares or (1,) * len(targets))
    if len(sizes) != len(targets):
        raise WeightsError(f"{source}: {len(targets)} leaves, but shares={sizes}.")
    return [
        Rule(source, target, transform, part=Part(index, sizes, axis), layers=layers)
        for index, target in enumerate(targets)
    ]


def per_stage(rules: Iterable[Rule | Ignore], stages: Iterable[int]) -> list[Rule | Ignore]:
    """Returns `rules` once a stage, with its number for `{s}` in foreign keys and our paths.

    `Rule("layers.{s}.blocks.{i}.norm1.weight", "stages_{s}/layers/norm1/scale")` for stages
    `range(4)`: four stacks, each as deep as its stage.
    """

    def numbered(rule: Rule | Ignore, stage: str) -> Rule | Ignore:
        if isinstance(rule, Ignore):
            return Ignore(rule.pattern.replace("{s}", stage))
        return dataclasses.replace(
            rule,
            source=rule.source.replace("{s}", stage),
            target=rule.target.replace("{s}", stage),
            aliases=tuple(key.replace("{s}", stage) for key in rule.aliases),
            copies=tuple(key.replace("{s}", stage) for key in rule.copies),
            fallbacks=tuple(key.replace("{s}", stage) for key in rule.fallbacks),
        )

    rules = list(rules)
    return [numbered(rule, str(stage)) for stage in stages for rule in rules]


def with_prefix(rules: Iterable[Rule | Ignore], source: str = "", target: str = "") -> list:
    """Returns `rules` with `source` before every foreign key and `target` before our paths."""

    def prefixed(rule: Rule | Ignore) -> Rule | Ignore:
        if isinstance(rule, Ignore):
            return Ignore(source + rule.pattern)
        return dataclasses.replace(
            rule,
            source=source + rule.source,
            target=target + rule.target,
            aliases=tuple(source + key for key in rule.aliases),
            copies=tuple(source + key for key in rule.copies),
            fallbacks=tuple(source + key for key in rule.fallbacks),
        )

    return [prefixed(rule) for rule in rules]


def drop_absent(rules: Iterable[Rule | Ignore], keys: Container[str], roots: Iterable[str]) -> list:
    """Returns `rules` without those under our paths `roots` of which a file has no tensor at all.

    For heads and other parts that some files of a family have: what is left must be complete.

    Args:
      rules: the table.
      keys: of the file; fallbacks do not count as present.
      roots: our paths, `pooler`, `mlm_head`; each is kept or dropped as a whole.
    """
    rules = list(rules)
    absent = set()
    for root in roots:
        inside = [r for r in rules if isinstance(r, Rule) and f"{r.target}/".startswith(f"{root}/")]
        first = (key.replace("{i}", "0") for r in inside for key in (r.source, *r.aliases))
        if not any(key in keys for key in first):
            absent.update(rule.target for rule in inside)
    return [rule for rule in rules if isinstance(rule, Ignore) or rule.target not in absent]


def table_faults(rules: Rules) -> list[str]:
    """Returns what is wrong with the table itself: packed tensors with absent or doubled parts."""
    groups: dict[str, list[Rule]] = {}
    for rule in rules:
        if isinstance(rule, Rule) and rule.part:
            groups.setdefault(rule.source, []).append(rule)
    faults = []
    for source, group in groups.items():
        first = group[0]
        if any(
            (r.part.shares, r.part.axis, r.layers, r.aliases, r.copies)
            != (first.part.shares, first.part.axis, first.layers, first.aliases, first.copies)
            for r in group
        ):
            faults.append(f"rules for {source} differ in shares, axis, layers or aliases")
        elif sorted(r.part.index for r in group) != list(range(len(first.part.shares))):
            found = sorted(r.part.index for r in group)
            faults.append(f"rules for {source} give parts {found} of {len(first.part.shares)}")
    return faults


@functools.cache
def pattern(text: str) -> re.Pattern[str]:
    """Returns the expression of a foreign key in which `{i}` is a number and `*` any text."""
    expression = re.escape(text).replace(r"\{i\}", "([0-9]+)").replace(r"\*", ".*")
    return re.compile(expression, re.DOTALL)


def unexpected(keys: Iterable[str], paths: Iterable[str], rules: Rules) -> Iterator[str]:
    """Yields a line for every foreign key that neither the model nor the table accounts for.

    Args:
      keys: foreign keys that no rule has claimed.
      paths: of our leaves.
      rules: the table.
    """
    accepted = [pattern(rule.pattern) for rule in rules if isinstance(rule, Ignore)]
    known: list[tuple[re.Pattern[str], str]] = []
    leaves = set(paths)
    sources = {rule.source for rule in rules if isinstance(rule, Rule)}
    for rule in rules:
        if not isinstance(rule, Rule):
            continue
        # A fallback that is another rule's source (a tied tensor) is that rule's to account for.
        fallbacks = [key for key in rule.fallbacks if key not in sources]
        patterns = [pattern(key) for key in (rule.source, *rule.aliases, *fallbacks)]
        known += [(regex, rule.target) for regex in patterns]
        if rule.optional and rule.target not in leaves:
            accepted += patterns
    for key in keys:
        if any(regex.fullmatch(key) for regex in accepted):
            continue
        targets = [target for regex, target in known if regex.fullmatch(key)]
        note = f": the model has no place for it at {targets[0]}" if targets else ""
        yield f"unexpected: {key}{note}"


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    parts = re.split(r"([0-9]+)", text)
    # Long digit runs (a hostile key) stay text: Python refuses to convert them.
    return [(0, int(p), "") if p.isdigit() and len(p) < 9 else (1, 0, p) for p in parts]
