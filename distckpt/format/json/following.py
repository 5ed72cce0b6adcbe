"""The text of a list of records where one list follows another: only what has come to it is made.

States of a log have most of their records in common, in the same order; what goes goes from the front, what comes comes
at the end. So the cost of the next text hardly depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Record = TypeVar("Record")

MOST_GONE = 16
"""How many records may have gone from the front of a list before its text is made anew."""


class FollowingText(Generic[Record]):
    """The texts that ``make`` makes of the records of one list, one after the other. For one thread at a time."""

    def __init__(self, make: Callable[[Record], bytes]) -> None:
        self._make = make
        self.records: tuple[Record, ...] = ()
        self.text = b""

    def follow(self, records: tuple[Record, ...]) -> tuple[Sequence[Record], Sequence[Record]]:
        """The list is this one now: which records have gone since the last time, and which have come."""
        gone, kept = _shared(self.records, records)
        left, come = self.records[:gone], records[kept:]
        begin = sum(len(self._make(record)) for record in left) if kept else len(self.text)
        text = b"".join((memoryview(self.text)[begin:], *map(self._make, come)))
        self.records, self.text = records, text
        return left, come


def _shared(old: tuple[Record, ...], new: tuple[Record, ...]) -> tuple[int, int]:
    """How many have gone from the front of ``old``, so that the others, so many, are the beginning of ``new``."""
    first = new[:1]
    gone = next((at for at in range(min(len(old), MOST_GONE)) if old[at : at + 1] == first), len(old))
    kept = len(old) - gone
    return (gone, kept) if old[gone:] == new[:kept] else (len(old), 0)
