"""What a parity file allows: its `tolerance` or `tol` in any of the ways the files write it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

DEFAULT = 1e-5
_NUMBER = re.compile(r"\d+(?:\.\d*)?e-?\d+|0?\.\d+")
_GROUPS = {
    "outputs": ("forward", "output", "outputs", "float32_outputs", "float32"),
    "grads": ("grad", "grads", "backward", "float32_grads", "float32"),
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Largest difference that counts as equal: `absolute + relative * max|reference|`."""

    absolute: float = 0.0
    relative: float = 0.0

    def allows(self, error: float, scale: float) -> bool:
        """Whether a relative error (of `scale`, the largest entry; absolute if 0) is within."""
        if scale:
            return error <= self.relative + self.absolute / scale
        return error <= self.absolute + self.relative


def bound(meta: Mapping[str, Any], name: str) -> Bound:
    """The bound of one array, by its full name (`outputs/...`, `grads/...`).

    A file gives a number (relative), a sentence, a dict with `atol` and `rtol`, or a dict by array
    name, part of a name, or `forward` and `grad`. In a sentence "abs" and "atol" mean absolute,
    and "X on A, Y on B" goes by the name; "exact" without a number means 0.
    """
    return _bound(meta.get("tolerance", meta.get("tol", DEFAULT)), name)


def _bound(given: Any, name: str) -> Bound:
    if isinstance(given, str):
        return _sentence(given, name)
    if not isinstance(given, Mapping):
        return Bound(relative=float(given))
    if "atol" in given:
        kind = "grad_" if name.startswith("grads/") and "grad_atol" in given else ""
        return Bound(float(given[f"{kind}atol"]), float(given.get(f"{kind}rtol", 0.0)))
    group, _, short = name.removeprefix("outputs/" * name.startswith("outputs/grads/")).partition(
        "/"
    )
    last = short.rpartition("/")[2]
    parts = [key for key in given if group == "outputs" and key.rstrip(".*") in short]
    for key in (name, short, last, *sorted(parts, key=len)[::-1], *_GROUPS[group], "default"):
        if key in given:
            return _bound(given[key], name)
    return Bound(relative=DEFAULT)


def _sentence(text: str, name: str) -> Bound:
    plain = re.sub(r"\([^)]*\)", "", text)  # what stands in brackets explains
    text = plain if _NUMBER.search(plain) else text
    pieces = [piece for piece in re.split(r"[,;]", text) if _NUMBER.search(piece)]
    if not pieces:
        return Bound()
    named = [piece for piece in pieces if _speaks_of(piece, name)]
    # Where nothing speaks of this array, the strictest holds.
    piece = named[0] if named else min(pieces, key=_first)
    if "rtol" in piece:
        absolute = re.search(rf"atol ({_NUMBER.pattern})", text)
        relative = re.search(rf"rtol ({_NUMBER.pattern})", text)
        return Bound(float(absolute.group(1)) if absolute else 0.0, float(relative.group(1)))
    absolute = "abs" in text and "rel" not in piece
    return Bound(absolute=_first(piece)) if absolute else Bound(relative=_first(piece))


def _first(piece: str) -> float:
    return float(_NUMBER.search(piece).group())


def _speaks_of(piece: str, name: str) -> bool:
    words = re.findall(r"[a-z_]{4,}", piece.lower())
    return any(word.rstrip("s") in name.lower() for word in words)
