"""Metrics of generated text: exact match, token F1 and ROUGE, as exact means over a data set.

    total = text_metrics.TextMetrics()
    total.add("the Eiffel Tower", ["Eiffel Tower", "tower"])
    total.result()                     # {"exact_match": 1.0, "f1": 1.0, "rouge1": ..., "count": 1}

All values lie between 0 and 1; papers print them times 100. As a command, on JSON lines:

    python -m jaxmodels.data.text_metrics predictions.jsonl                    # both in each line
    python -m jaxmodels.data.text_metrics answers.jsonl --references dev.jsonl \\
        --prediction_field answer --reference_field output --metrics exact_match,f1
"""

import argparse
import collections
import itertools
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxmodels.data import rouge

NAMES = ("exact_match", "f1", *rouge.NAMES)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Returns SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Returns 1.0 where both have the same normal form, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Returns F1 of the words of both normal forms; 0.0 where they share none."""
    made, wanted = (normalize_answer(text).split() for text in (prediction, reference))
    hits = sum((collections.Counter(made) & collections.Counter(wanted)).values())
    return 2 * hits / (len(made) + len(wanted)) if hits else 0.0


def score(
    prediction: str, references: Sequence[str], names: Sequence[str] = NAMES
) -> dict[str, float]:
    """Returns each metric of one prediction, the best over its references.

    Args:
      prediction: the generated text.
      references: one accepted text or more.
      names: which of `NAMES` to compute.

    Raises:
      ValueError: no reference, or a metric that does not exist.
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"references={references!r}: a list of one text or more is needed")
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"no metric is called {unknown[0]!r}: use {', '.join(NAMES)}")
    found = [_scores(prediction, reference, names) for reference in references]
    return {name: max(each[name] for each in found) for name in names}


def accuracy(predictions: Sequence[object], labels: Sequence[object]) -> float:
    """Returns the share of predictions that equal their label.

    Raises:
      ValueError: none, or not as many labels.
    """
    if not predictions or len(predictions) != len(labels):
        raise ValueError(
            f"{len(predictions)} predictions and {len(labels)} labels: as many of each, at least "
            "one, are needed"
        )
    return sum(p == label for p, label in zip(predictions, labels, strict=True)) / len(labels)


class TextMetrics:
    """Sums metrics over a data set: every example counts once, whatever the batches were."""

    def __init__(self, names: Sequence[str] = NAMES) -> None:
        """Starts empty.

        Args:
          names: which of `NAMES` to compute.
        """
        self.names = tuple(names)
        self.count = 0
        self._values: dict[str, list[float]] = {name: [] for name in self.names}

    def add(self, prediction: str, references: Sequence[str]) -> dict[str, float]:
        """Adds one prediction and returns its own values; see `score`."""
        found = score(prediction, references, self.names)
        for name, value in found.items():
            self._values[name].append(value)
        self.count += 1
        return found

    def add_all(self, pairs: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Adds (prediction, references) pairs."""
        for prediction, references in pairs:
            self.add(prediction, references)

    def result(self) -> dict[str, float]:
        """Returns the mean of every metric, and `count`, the number of examples.

        Raises:
          ValueError: nothing was added.
        """
        if not self.count:
            raise ValueError("no predictions were scored: the data set or its filter is empty")
        means = {name: math.fsum(values) / self.count for name, values in self._values.items()}
        return means | {"count": float(self.count)}


_SINGLE: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": token_f1}


def _scores(prediction: str, reference: str, names: Sequence[str]) -> dict[str, float]:
    found = {name: _SINGLE[name](prediction, reference) for name in names if name in _SINGLE}
    if any(name in rouge.NAMES for name in names):
        found |= rouge.scores(prediction, reference)
    return {name: found[name] for name in names}


def read_pairs(
    predictions: str,
    references: str | None = None,
    prediction_field: str = "prediction",
    reference_field: str = "references",
) -> Iterator[tuple[str, list[str]]]:
    """Yields (prediction, references) of JSON lines.

    Args:
      predictions: file with an object a line.
      references: file whose lines belong to those of `predictions`; None: the same objects.
      prediction_field: its text.
      reference_field: a text, or a list of accepted texts.

    Raises:
      ValueError: a line that is no object or lacks the field; files of different lengths.
    """
    pairs: Iterable[tuple[Any, Any]] = ((row, row) for row in _rows(predictions))
    if references is not None:
        pairs = itertools.zip_longest(_rows(predictions), _rows(references))
    for number, (made, wanted) in enumerate(pairs, start=1):
        if made is None or wanted is None:
            short = predictions if made is None else references
            raise ValueError(f"{short} ends before line {number}: as many lines are needed")
        text = _field(made, prediction_field, f"{predictions}, line {number}")
        found = _field(wanted, reference_field, f"{references or predictions}, line {number}")
        accepted = [found] if isinstance(found, str) else found
        if not isinstance(text, str) or not _are_texts(accepted):
            raise ValueError(
                f"line {number}: {prediction_field!r} must be a text and {reference_field!r} a "
                "text, or a list of one text or more"
            )
        yield text, accepted


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: an object is wanted")
                yield row
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON lines: {error}") from error


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}; it has {', '.join(row) or 'none'}")
    return row[name]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the exact means over a file of generated texts, as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m jaxmodels.data.text_metrics")
    parser.add_argument("predictions", help="JSON lines with the generated texts")
    parser.add_argument("--references", help="JSON lines in the same order; default: the same file")
    parser.add_argument("--prediction_field", default="prediction")
    parser.add_argument("--reference_field", default="references")
    parser.add_argument("--metrics", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    given = parser.parse_args(argv)
    total = TextMetrics(given.metrics.split(","))
    fields = given.prediction_field, given.reference_field
    try:
        total.add_all(read_pairs(given.predictions, given.references, *fields))
        found = total.result()
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps({name: round(value, 6) for name, value in found.items()}))


if __name__ == "__main__":
    main()
