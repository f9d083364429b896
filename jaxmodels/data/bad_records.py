"""Counts the bad records of a run: each once, over workers, epochs and restarts."""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxmodels.data.records import RecordError

_LOG = logging.getLogger(__name__)


class BadRecord(NamedTuple):
    """A record that was left out of a batch: its stage, its number in the source, and why."""

    stage: int
    index: int
    reason: str


class Tally:
    """The distinct bad records so far; it logs each once and stops above the limit.

    It belongs to the iterator, not to its workers: they only send along what each batch lacks. So
    the count after a batch depends on that batch's number alone.

    Attributes:
      limit: distinct bad records allowed.
    """

    def __init__(self, limit: int, left_out: int, logged: set[tuple[int, int]]) -> None:
        """Starts empty.

        Args:
          limit: distinct bad records allowed.
          left_out: bad records that a source left out before, which count as well.
          logged: those that need not be logged again; shared by the iterators of one data set.
        """
        self.limit = limit
        self._left_out = left_out
        self._logged = logged
        self._seen: set[tuple[int, int]] = set()
        self._text = ""

    def add(self, bad: Iterable[BadRecord]) -> None:
        """Counts what one batch lacks.

        Raises:
          RecordError: there are now more than the limit.
        """
        for record in bad:
            key = record.stage, record.index
            if key in self._seen:
                continue
            self._seen.add(key)
            self._text = ""
            count = self._left_out + len(self._seen)
            check_count(count, self.limit, record.reason)
            if key not in self._logged:
                self._logged.add(key)
                log(count, self.limit, record.reason)

    def state(self) -> str:
        """Returns the records as text for a checkpoint: "stage/record" each, sorted."""
        if self._seen and not self._text:
            self._text = _to_text(self._seen)
        return self._text

    def restore(self, state: str) -> None:
        """Continues with the records of `state`.

        Raises:
          ValueError: no such text, or more records than the limit allows now.
        """
        seen = _from_text(state)
        if self._left_out + len(seen) > self.limit:
            raise ValueError(
                f"{self._left_out + len(seen)} bad records were left out so far, now "
                f"max_bad_records={self.limit}: raise it to at least that, or mend the records"
            )
        self._seen, self._text = seen, ""


def check_count(count: int, limit: int, last: str) -> None:
    """Stops above the limit.

    Args:
      count: bad records so far.
      limit: bad records allowed.
      last: what the last one is.

    Raises:
      RecordError: `count` exceeds `limit`; names the last one.
    """
    if count > limit:
        more = f"more than max_bad_records={limit} bad records; the last: " if limit else ""
        raise RecordError(f"{more}{last}")


def log(count: int, limit: int, reason: str) -> None:
    """Logs that a record is left out."""
    _LOG.warning("bad record %d of at most %d left out: %s", count, limit, reason)


def union(states: Sequence[str]) -> str:
    """Returns the state that holds the bad records of all of `states`, for several processes."""
    return _to_text(set().union(*map(_from_text, states)))


def _to_text(seen: Iterable[tuple[int, int]]) -> str:
    return " ".join(f"{stage}/{index}" for stage, index in sorted(seen))


def _from_text(state: str) -> set[tuple[int, int]]:
    try:
        pairs = [word.split("/") for word in state.split()]
        return {(int(stage), int(index)) for stage, index in pairs}
    except (ValueError, AttributeError):
        raise ValueError(f"{state!r} is no list of bad records such as '0/17 0/42'") from None
