"""Reads single records, and says of a bad one which it is, where it lies and what is wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Example = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Mapping[str, Any]]
_READING = "while reading "


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
    try:
        record = source[index]
        example = record if transform is None else transform(record, rng())
        if not isinstance(example, Mapping) or not example:
            raise TypeError(f"a dict of arrays is needed, got {type(example).__name__}")
        return {str(name): _array(name, value) for name, value in example.items()}
    except (ValueError, TypeError, LookupError) as error:
        # A ValueError is written for people; the text of the others says little without the type.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RecordError(f"{name_record(source, index)}: {kind}{error}") from error
    except Exception as error:
        error.add_note(f"{_READING}{name_record(source, index)}")
        raise


def reading_note(error: BaseException) -> str | None:
    """Returns "while reading record ..." where `read_example` said so of `error`, else None."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith(_READING)), None)


def check_like(example: Example, first: Example, where: Callable[[], str]) -> None:
    """Checks that an example has the fields, shapes and dtypes of another.

    Args:
      example: the one to check.
      first: the other.
      where: names the record; called only where it is bad.

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
        raise RecordError(f"{where()}: {'; '.join(wrong)}")


def name_record(source: Any, index: int) -> str:
    """Returns "record 7 (corpus.txt, line 12) of ...".

    The place in brackets is `source.where(index)`, for sources that know the file of a record.
    """
    place = ""
    if hasattr(source, "where"):
        try:
            place = source.where(index)
        except (ValueError, LookupError, OSError):
            place = ""  # the record itself is reported; its place is a courtesy
    return f"record {index}{f' ({place})' if place else ''} of {describe_briefly(source)}"


def describe_briefly(source: Any) -> str:
    """Returns a name of a source that fits into an error message."""
    text = repr(source)
    return text if len(text) <= 120 and " at 0x" not in text else type(source).__name__


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"field {name!r} is of type {array.dtype}: a batch holds numbers and booleans; "
            "encode the field or leave it out in the transform"
        )
    return array
