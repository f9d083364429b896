"""Reads single records, says which one is at fault, and identifies sources and transforms."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Example = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]


class RecordError(ValueError):
    """A record that cannot become a row of a batch; the message names source, record and reason."""


def read_example(
    source: Any, index: int, transform: Transform | None, rng: Callable[[], Any]
) -> Example:
    """Reads one record and makes its example, a dict of numpy arrays.

    Args:
      source: random access to records.
      index: number of the record.
      transform: see `pipeline.Stage`.
      rng: makes the random generator; called only where there is a transform.

    Raises:
      RecordError: the record or its transform is at fault (ValueError, TypeError, KeyError or
        IndexError).
      Exception: anything else (a lost disk, for instance), with a note that names the record.
    """
    where = f"record {index} of {describe_briefly(source)}"
    try:
        record = source[index]
        example = record if transform is None else transform(record, rng())
        if not isinstance(example, Mapping) or not example:
            raise TypeError(f"a dict of arrays is needed, got {type(example).__name__}")
        return {str(name): _array(name, value) for name, value in example.items()}
    except (ValueError, TypeError, LookupError) as error:
        raise RecordError(f"{where}: {type(error).__name__}: {error}") from error
    except Exception as error:
        error.add_note(f"while reading {where}")
        raise


def check_like(example: Example, first: Example, where: str) -> None:
    """Checks that an example has the fields, shapes and dtypes of another.

    Raises:
      RecordError: it does not; every difference is listed.
    """
    wrong = [f"field {name!r} is missing" for name in first if name not in example]
    for name, value in example.items():
        if name not in first:
            wrong.append(f"field {name!r} is not in the other records")
        elif (value.shape, value.dtype) != (first[name].shape, first[name].dtype):
            wrong.append(
                f"field {name!r} is {value.dtype}{list(value.shape)}, "
                f"in the other records {first[name].dtype}{list(first[name].shape)}"
            )
    if wrong:
        raise RecordError(f"{where}: {'; '.join(wrong)}")


def describe_briefly(source: Any) -> str:
    """Returns a name of a source that fits into an error message."""
    text = repr(source)
    return text if len(text) <= 120 and " at 0x" not in text else type(source).__name__


def describe_source(source: Any) -> dict[str, Any]:
    """Returns JSON values that identify a source.

    Its own `fingerprint` where it has one; else its type, its length and a digest of its first and
    last record.
    """
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return _json(own() if callable(own) else own)
    ends = sorted({0, len(source) - 1}) if len(source) else []
    return {
        "type": type(source).__qualname__,
        "records": len(source),
        "ends_sha256": _digest([_record_or_error(source, index) for index in ends]),
    }


def describe_transform(transform: Transform | None) -> Any:
    """Returns JSON values that identify a transform: its own `fingerprint`, or its name and "
    "settings."""
    own = getattr(transform, "fingerprint", None)
    if own is not None:
        return _json(own() if callable(own) else own)
    if transform is None:
        return None
    if isinstance(transform, functools.partial):
        settings = {"args": transform.args, **transform.keywords}
        return {"partial": describe_transform(transform.func), "settings": _settings(settings)}
    if dataclasses.is_dataclass(transform) and not isinstance(transform, type):
        fields = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
        return {"name": type(transform).__qualname__, "settings": _settings(fields)}
    return {"name": getattr(transform, "__qualname__", type(transform).__qualname__)}


def _record_or_error(source: Any, index: int) -> Any:
    """A bad record is not reported here: reading it for a batch does that."""
    try:
        return source[index]
    except (ValueError, TypeError, LookupError) as error:
        return f"unreadable: {error}"


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"field {name!r} is of type {array.dtype}: a batch holds numbers and booleans; "
            "encode the field or leave it out in the transform"
        )
    return array


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON values; what JSON cannot hold is identified by a digest of its content."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = _json(value)
        except (TypeError, ValueError):
            found[name] = _digest(value)
    return found


def _json(value: Any) -> Any:
    """Returns `value` as it would come back from a JSON file."""
    return json.loads(json.dumps(value, sort_keys=True, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _digest(value: Any) -> str:
    """Returns a SHA-256 of nested dicts, lists, arrays and scalars; the rest counts by type."""
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Mapping):
            for key in sorted(item, key=str):
                digest.update(f"key {key} ".encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            digest.update(f"list {len(item)} ".encode())
            for element in item:
                add(element)
        elif isinstance(item, (str, bytes, bool, int, float, type(None))):
            digest.update(repr(item).encode())
        elif isinstance(item, (np.ndarray, np.generic)) and item.dtype.kind in "biufcSU":
            array = np.ascontiguousarray(item)
            digest.update(f"array {array.dtype} {array.shape} ".encode() + array.tobytes())
        else:
            digest.update(type(item).__qualname__.encode())

    add(value)
    return digest.hexdigest()
