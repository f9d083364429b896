"""Names that do not exist: the error, with the known names that may have been meant."""

import difflib
from collections.abc import Iterable


class FieldError(ValueError):
    """A field that does not exist, or a value that it does not take. The message is one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `; nearest: a, b` for the known names that `name` may have meant, or nothing."""
    known = list(known)
    wanted = name.rpartition(".")[2]
    last = {full: full.rpartition(".")[2] for full in known}
    # `optimizer.lr` for `optimizer.learning_rate`; `warmup_steps` for `optimizer.warmup_steps`.
    near = [full for full, part in last.items() if part == wanted or _initials(part) == wanted]
    if not near:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not near:
        found = difflib.get_close_matches(wanted, last.values(), n=3, cutoff=0.6)
        near = [full for full, part in last.items() if part in found]
    near = near[:3]
    return f"; nearest: {', '.join(near)}" if near else ""


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_") if word)


def unknown(what: str, name: str, known: Iterable[str]) -> FieldError:
    """Returns the error for a name that does not exist, with the nearest (or all) known ones."""
    known = list(known)
    near = nearest(name, known)
    if not near and len(known) <= 12:
        near = f"; known: {', '.join(known)}" if known else "; there are none"
    return FieldError(f"unknown {what} {name!r}{near}")
