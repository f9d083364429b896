"""Identifies sources and transforms, so that a saved position is only used on the same data."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.data.records import Transform


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
    """Returns JSON values that identify a transform: its `fingerprint`, or name and settings."""
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


def differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """Returns a line for each value in which two fingerprints differ, naming both values.

    Args:
      saved: JSON values, `dataset.fingerprint` at the time of the checkpoint.
      current: those of now.
      name: of the value itself; nested names are joined by "/".
    """
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        return [
            line
            for key in sorted(saved.keys() | current.keys())
            for line in differences(
                saved.get(key), current.get(key), f"{name}/{key}" if name else str(key)
            )
        ]
    if saved == current:
        return []
    return [f"{name or 'data'}: saved {_shown(saved)}, now {_shown(current)}"]


def _shown(value: Any) -> str:
    """A value for one line; what is absent (None in a fingerprint) is called so."""
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _record_or_error(source: Any, index: int) -> Any:
    """A bad record is not reported here: reading it for a batch does that."""
    try:
        return source[index]
    except (ValueError, TypeError, LookupError) as error:
        return f"unreadable: {error}"


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
