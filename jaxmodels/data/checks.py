"""Checks of single fields for transforms: messages name the field, what it holds, what it may."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_KINDS = {"b": "booleans", "i": "integers", "u": "integers", "f": "floats", "c": "complex numbers"}
_DECODERS_FAIL_WITH = (ValueError, TypeError, LookupError, ArithmeticError, OSError, EOFError)


def field_of(record: Any, name: str) -> Any:
    """Returns `record[name]`.

    Raises:
      ValueError: the record has no such field, or it is None.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record with fields is needed, this is a {type(record).__name__}")
    if record.get(name) is None:
        raise ValueError(f"field {name!r} is missing; the record has {_listed(sorted(record))}")
    return record[name]


def check_field(
    record: Mapping[str, Any],
    name: str,
    *,
    kinds: str = "biuf",
    shape: Sequence[int | None] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Returns a field of numbers as an array.

    Args:
      record: the record.
      name: of the field.
      kinds: accepted kinds of numpy dtypes, by letter: b, i, u, f, c.
      shape: sizes of the axes; a negative one, -n, accepts 1 to n, and None any size.
      low: smallest value accepted.
      high: largest value accepted.

    Raises:
      ValueError: the field is missing, of another kind or shape, holds NaN or infinity, or a value
        outside [low, high].
    """
    array = np.asarray(field_of(record, name))
    if array.dtype.kind not in kinds:
        accepted = dict.fromkeys(_KINDS[kind] for kind in kinds)
        raise ValueError(
            f"field {name!r} is of type {array.dtype}: {' or '.join(accepted)} are accepted"
        )
    if shape is not None and not _shape_fits(array.shape, shape):
        sizes = ", ".join(_size(size) for size in shape)
        raise ValueError(f"field {name!r} has shape {list(array.shape)}: [{sizes}] is accepted")
    wrong = _first_outside(array, low, high)
    if wrong is not None:
        raise ValueError(f"field {name!r} holds {wrong}: {_range(low, high)} is accepted")
    return array


def check_text(record: Mapping[str, Any], name: str, longest: int | None = None) -> str:
    """Returns a field of text; bytes are decoded.

    Args:
      record: the record.
      name: of the field.
      longest: characters accepted; None: any number.

    Raises:
      ValueError: the field is missing, no text, not UTF-8, empty, or longer than `longest`.
    """
    value = field_of(record, name)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"field {name!r} holds byte {value[error.start]:#04x} at {error.start}: UTF-8 text "
                "is accepted"
            ) from None
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is of type {type(value).__name__}: text is accepted")
    accepted = "1 character or more is" if longest is None else f"1 to {longest} characters are"
    if not value.strip():
        raise ValueError(f"field {name!r} is empty: {accepted} accepted")
    if longest is not None and len(value) > longest:
        raise ValueError(f"field {name!r} has {len(value)} characters: {accepted} accepted")
    return value


@contextlib.contextmanager
def decoding(name: str, accepted: str) -> Iterator[None]:
    """Makes a decoder's complaint about a field's bytes the record's fault, whatever its type.

    Image and video libraries report a cut file as OSError, which otherwise means a lost disk. Put
    only the decoding itself under this, not the reading of a file.

    Args:
      name: of the field.
      accepted: what can be decoded, such as "a JPEG or PNG image".

    Raises:
      ValueError: the code under it failed.
    """
    try:
        yield
    except _DECODERS_FAIL_WITH as error:
        raise ValueError(
            f"field {name!r} cannot be decoded ({type(error).__name__}: {error}): {accepted} is "
            "accepted"
        ) from error


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown or "no fields"


def _shape_fits(found: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(
        size is None or (1 <= n <= -size if size < 0 else n == size)
        for n, size in zip(found, wanted, strict=True)
    )


def _size(size: int | None) -> str:
    return "any" if size is None else f"1 to {-size}" if size < 0 else str(size)


def _first_outside(array: np.ndarray, low: float | None, high: float | None) -> Any:
    """The first value that is not finite or outside the range; None where there is none."""
    outside = ~np.isfinite(array) if array.dtype.kind in "fc" else np.zeros(array.shape, bool)
    if low is not None:
        outside |= array < low
    if high is not None:
        outside |= array > high
    return array[outside].flat[0] if outside.any() else None


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "any finite number"
    if low is None or high is None:
        return f"{high} or less" if low is None else f"{low} or more"
    return f"{low} to {high}"
