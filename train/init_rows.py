"""Tables with more rows than the published ones: what fills the further rows is said by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.weights import WeightsError

FILLS = ("repeat", "fresh", "new")
_PADDING_ROWS = 2  # RoBERTa's positions begin behind two rows that stand for none


def chosen(rows: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Returns {leaf of the file: one of `FILLS`}.

    Args:
      rows: "LEAF=FILL" each, LEAF being a leaf's path or the end of one.
      names: the leaves of the file.

    Raises:
      WeightsError: not of that form, or LEAF names none or several leaves.
    """
    found: dict[str, str] = {}
    for given in rows:
        end, _, fill = given.partition("=")
        if fill not in FILLS or not end:
            raise WeightsError(f"init_rows: {given!r}: accepted is LEAF={'|'.join(FILLS)}")
        meant = [name for name in names if f"/{name}".endswith(f"/{end}")]
        if len(meant) != 1:
            many = f"names {', '.join(meant)}: give one path whole" if meant else "is no leaf of it"
            raise WeightsError(
                f"init_rows: {end!r} {many}; the file has {', '.join(sorted(names))}"
            )
        found[meant[0]] = fill
    return found


def check_shape(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises WeightsError unless `shape` [rows, ...] is that of the first rows of `wanted`."""
    if len(shape) != len(wanted) or tuple(shape[1:]) != tuple(wanted[1:]) or shape[0] > wanted[0]:
        raise WeightsError(
            f"init_rows: {name} is {list(shape)} in the file and {list(wanted)} in the model: only "
            "a table with fewer rows can be filled up"
        )


def fill_up(published: Mapping[str, Any], fills: Mapping[str, str], model: Any) -> dict[str, Any]:
    """Returns {path: the whole table} of the leaves that `fills` names, placed as in `model`.

    "repeat" gives rows 0...n-1 of the file and then its rows 2...n-1 again and again, as RoBERTa's
    positions are made longer; "fresh" keeps the model's own further rows; "new" all of its own.

    Args:
      published: {path: array [n, ...]}.
      fills: {path: one of `FILLS`}.
      model: {path: the model's fresh table [m, ...]}, m >= n.
    """
    made = {}
    for path, fill in fills.items():
        own = model[path]
        make = jax.jit(_FILLED[fill], out_shardings=own.sharding)
        made[path] = make(own, published[path].astype(own.dtype))
    return made


def _repeat(own: jax.Array, rows: jax.Array) -> jax.Array:
    count, first = len(rows), min(_PADDING_ROWS, len(rows) - 1)
    place = jnp.arange(len(own))
    return rows[jnp.where(place < count, place, first + (place - count) % (count - first))]


_FILLED = {
    "repeat": _repeat,
    "fresh": lambda own, rows: own.at[: len(rows)].set(rows),
    "new": lambda own, rows: own,
}
