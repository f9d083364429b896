"""Reads a compiled program's text: which collectives it runs, how often, over which links.

Understands the forms that XLA writes for TPU, GPU and CPU: groups of devices listed, as a reshaped
range (`[2,4]<=[8]`) or as axes of a mesh; pairs of a permutation; asynchronous pairs, which count
once; TPU fusions that hold one collective in several parts; transfers between TPU slices, which
are sends to the host. A collective in a loop counts once a turn.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# A tuple result of these is (operands, results, ...); of all-reduce-start it is the results.
_HOLDS_OPERANDS = set(KINDS) - {"all-reduce"}
_BYTES = {"pred": 1, "token": 0, "opaque": 0}

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r"_xla_megascale_target=(\{\{[\d,{}]*\}\})")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?$")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array on one device: the result, for a reduce-scatter the operand.
      groups: places (in the order of the mesh's devices) that exchange data; None: all together;
        empty: the same place of every slice.
      pairs: (from, to) places of a permutation; empty for the other kinds.
      times: runs in one call of the program.
      certain: False where it is in a loop whose turns are not known, which counts as one.
      by_hosts: a transfer between TPU slices: hosts carry all of it, parts for the own slice too.
    """

    kind: str
    bytes: int
    groups: Groups | None
    pairs: tuple[tuple[int, int], ...] = ()
    times: int = 1
    certain: bool = True
    by_hosts: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same axes and links.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes along which devices exchange data: "device", "node" or "node+device".
      network: links that carry it: "ICI", "DCN", "NVLink", "ICI+DCN", ...
      count: instructions, each as often as it runs.
      bytes: of the arrays, one device, all runs.
      sent: bytes that one device sends at least (ring or direct), all runs.
      certain: False where some run in a loop whose turns are not known, counted as one turn.
    """

    kind: str
    axes: str
    network: str
    count: int
    bytes: int
    sent: int
    certain: bool


def read(text: str, slices: Sequence[int] = (), ids: Sequence[int] = ()) -> list[Collective]:
    """Returns the collectives of a compiled program, those in loops with their number of turns.

    Of a conditional every branch counts.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      slices: the slice of each place, for transfers between slices.
      ids: the device's number of each place, by which some of these name their members.

    Raises:
      ValueError: the text has no entry computation, or groups in a form not known here.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("the program's text has no ENTRY computation")
    done: dict[str, list[Collective]] = {}

    def visit(name: str) -> list[Collective]:
        if name not in done:
            done[name] = []  # no recursion in HLO; a name that is not there has nothing
            done[name] = [c for line in computations.get(name, ()) for c in of_line(name, line)]
        return done[name]

    def of_line(name: str, line: str) -> Iterable[Collective]:
        own = _transfer(line, ids) or _collective(name, line, slices)
        if own is not None:
            return (own,)
        if " while(" in line:
            return _in_loop(line, computations, visit)
        if "-done(" in line or "-update(" in line:
            return ()
        called = _CALLED.findall(line)
        for names in _CALLED_LIST.findall(line):
            called += [item.strip().lstrip("%") for item in names.split(",")]
        return itertools.chain.from_iterable(map(visit, called))

    return visit(entry)


def summarise(
    collectives: Iterable[Collective],
    shape: tuple[int, int],
    slices: Sequence[int],
    networks: tuple[str, str],
) -> list[Traffic]:
    """Adds collectives up by kind, mesh axes and network; those within one device are left out.

    Args:
      collectives: from `read`.
      shape: of the mesh (node, device); places count through it row by row.
      slices: the slice (or box) of each place.
      networks: names of the links (within a slice, between slices).
    """
    rows: dict[tuple[str, str, str], list[tuple[Collective, float]]] = {}
    for item in collectives:
        groups = _groups_of(item, len(slices), slices)
        size = max(map(len, groups), default=1)
        if size < 2:
            continue
        axes = _axes(groups, shape)
        links = networks[1] if item.by_hosts else _network(groups, slices, networks)
        key = item.kind, axes, links
        rows.setdefault(key, []).append((item, _share(item.kind, size)))
    return [
        Traffic(
            *key,
            count=sum(item.times for item, _ in found),
            bytes=sum(item.bytes * item.times for item, _ in found),
            sent=round(sum(item.bytes * item.times * share for item, share in found)),
            certain=all(item.certain for item, _ in found),
        )
        for key, found in sorted(rows.items())
    ]


def groups(text: str) -> Groups | None:
    """Returns the groups of devices that `replica_groups=` lists; None: all devices together.

    Args:
      text: what follows `replica_groups=`, with or without the rest of the line.

    Raises:
      ValueError: a form not known here.
    """
    if text.startswith("{}"):
        return None
    if match := _IOTA.match(text):
        dims, sizes, order = (_numbers(match[i]) for i in (1, 2, 3))
        places = np.arange(math.prod(sizes)).reshape(sizes)
        places = places.transpose(order) if order else places
        return _rows(places.reshape(dims))
    if match := _MESH.match(text):
        return _mesh_groups(match)
    if text.startswith("{{"):
        listed = text[1 : text.index("}}") + 1]
        return tuple(tuple(_numbers(item)) for item in re.findall(r"\{([\d,]*)\}", listed))
    raise ValueError(f"replica groups in a form not known here: {text[:80]!r}")


def _numbers(text: str | None) -> list[int]:
    return [int(item) for item in (text or "").split(",") if item]


def _rows(places: np.ndarray) -> Groups:
    return tuple(map(tuple, places.tolist()))


def _mesh_groups(match: re.Match[str]) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`: devices that differ in the named axes alone are a group.

    `'b':(2)2` is a part of an axis: the 2 values of it that follow a part of size 2.
    """
    named = [item.rpartition("=") for item in match[1].split(",")]
    names, sizes = [n.strip(" '") for n, _, _ in named], [int(size) for *_, size in named]
    places = np.arange(math.prod(sizes))
    if match[2]:
        places = _device_ids(match[2])
    shape: list[int] = []
    chosen: list[int] = []
    wanted = [_AXIS.match(item.strip()) for item in match[3].split(",") if item.strip()]
    for name, size in zip(names, sizes, strict=True):
        cuts = {1, size}
        parts = [m for m in wanted if m and m[1] == name]
        spans = [(int(m[2]), int(m[2]) * int(m[3])) if m[2] else (1, size) for m in parts]
        cuts |= {edge for span in spans for edge in span}
        for low, high in itertools.pairwise(sorted(cuts)):
            if any(first <= low and high <= last for first, last in spans):
                chosen.append(len(shape))
            shape.append(high // low)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    grouped = places.reshape(shape or [1]).transpose([*rest, *chosen] or [0])
    return _rows(grouped.reshape(-1, math.prod(shape[axis] for axis in chosen)))


def _device_ids(text: str) -> np.ndarray:
    """Device numbers in a list, or as a transposed range `[4,2]T(1,0)`."""
    match = re.fullmatch(r"(?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text.strip())
    if match is None:
        return np.array(_numbers(text.strip("[] ")))
    sizes, order = _numbers(match[1]), _numbers(match[2])
    if not order and "<=" not in text:
        return np.array(sizes)
    places = np.arange(math.prod(sizes)).reshape(sizes)
    return (places.transpose(order) if order else places).reshape(-1)


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """The lines of each computation by its name, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            lines.append(line)
        elif match := _HEADER.match(line):
            lines = found[match["name"]] = []
            entry = match["name"] if match["entry"] else entry
        else:
            lines = []
    return found, entry


def _in_loop(
    line: str,
    computations: dict[str, list[str]],
    visit: Callable[[str], list[Collective]],
) -> list[Collective]:
    """The collectives of a loop's body, as often as it turns."""
    match = _LOOP.search(line)
    if match is None:
        return []
    condition, body = match[1], match[2]
    turns = _turns(line, computations.get(condition, []))
    return [
        dataclasses.replace(
            item, times=item.times * (turns or 1), certain=item.certain and turns is not None
        )
        for item in visit(body)
    ]


def _turns(line: str, condition: list[str]) -> int | None:
    """Turns of a loop: as XLA notes them, else from a condition `counter < constant` from 0."""
    if match := _TURNS.search(line):
        return int(match[1])
    root = next((item for item in condition if item.lstrip().startswith("ROOT ")), "")
    compared = re.search(r" compare\(([^)]*)\), direction=LT", root)
    if compared is None:
        return None
    right = compared[1].split(",")[-1].split()[-1].lstrip("%")
    for item in condition:
        constant = re.match(rf"\s*%?{re.escape(right)} = \w+\[\]\S* constant\((\d+)\)", item)
        if constant:
            return int(constant[1])
    return None


def _transfer(line: str, ids: Sequence[int]) -> Collective | None:
    """The transfer between TPU slices that one line starts, if any."""
    if " send(" not in line or not (match := _MEGASCALE.search(line)):
        return None
    kind = match[1].lower().replace("_", "-")
    size = _sizes(line[: line.index(" send(")])[0]
    # Without a list, each slice sends its part to the same places of the others.
    listed = _TARGET.search(line)
    named = groups(listed[1]) if listed else None
    place = {number: index for index, number in enumerate(ids)}
    found: Groups = ()
    if named and all(member in place for group in named for member in group):
        found = tuple(tuple(place[member] for member in group) for group in named)
    return Collective(kind if kind in KINDS else "all-to-all", size, found, by_hosts=True)


def _collective(computation: str, line: str, slices: Sequence[int]) -> Collective | None:
    """The collective that one line of a computation starts, if any."""
    match = _COLLECTIVE.search(line)
    if match is None or _is_continuation(line):
        return None
    kind, start = match[1], match[2]
    sizes = _sizes(line[: match.start()])
    if start and kind in _HOLDS_OPERANDS:
        sizes = sizes[len(sizes) // 2 :]
    size = sum(sizes)
    if kind == "collective-permute":
        listed = line[line.index("source_target_pairs=") :].split("}}")[0] + "}"
        return Collective(kind, size, (), tuple((int(a), int(b)) for a, b in _PAIR.findall(listed)))
    _, _, rest = line.partition("replica_groups=")
    found = groups(rest) if rest else None
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU: a fusion of an all-reduce and the slice that is kept
    elif kind == "reduce-scatter":
        size *= len(found[0]) if found else max(1, len(slices))
    return Collective(kind, size, found)


def _is_continuation(line: str) -> bool:
    """Whether a TPU fusion goes on with a collective that another one started."""
    return "chain_id=" in line and re.search(r'"flag_start":"\d', line) is not None


def _sizes(text: str) -> list[int]:
    """Bytes of each array in the type of an instruction, without flags of asynchronous ones."""
    arrays = _ARRAY.findall(text.partition(" = ")[2])
    flags = ("u32", "s32")
    data = [(t, d) for t, d in arrays if not (t in flags and not d and len(arrays) > 1)]
    return [math.ceil(_item_bytes(t) * math.prod(_numbers(d))) for t, d in data]


def _item_bytes(name: str) -> float:
    """Bytes of one value of an XLA type: f32, bf16, s8, f8e4m3fn, u4, c64, pred."""
    if name in _BYTES:
        return _BYTES[name]
    bits = re.search(r"\d+", name)
    return int(bits[0]) / 8 if bits else 0


def _groups_of(item: Collective, places: int, slices: Sequence[int]) -> Groups:
    """The groups of a collective as places."""
    if item.pairs:
        return tuple(pair for pair in item.pairs if pair[0] != pair[1])
    if item.groups is None:
        return (tuple(range(places)),)
    if item.groups:
        return item.groups
    by_slice: dict[int, list[int]] = {}
    for place, index in enumerate(slices):
        by_slice.setdefault(index, []).append(place)
    return tuple(zip(*by_slice.values(), strict=True))


def _axes(groups: Groups, shape: tuple[int, int]) -> str:
    varies = [False, False]
    for group in groups:
        places = [divmod(place, shape[1]) for place in group]
        for axis in (0, 1):
            varies[axis] |= len({place[axis] for place in places}) > 1
    return "+".join(name for name, used in zip(("node", "device"), varies, strict=True) if used)


def _network(groups: Groups, slices: Sequence[int], networks: tuple[str, str]) -> str:
    near = far = False
    for group in groups:
        members = [slices[place] for place in group]
        far |= len(set(members)) > 1
        near |= len(set(members)) < len(members)
    used = [name for name, needed in zip(networks, (near, far), strict=True) if needed]
    return "+".join(dict.fromkeys(used))


def _share(kind: str, size: int) -> float:
    """Bytes that a device sends for each byte of the array, in a group of `size`."""
    if kind == "collective-permute":
        return 1.0
    ring = (size - 1) / size
    return 2 * ring if kind == "all-reduce" else 1.0 if kind == "collective-broadcast" else ring
