"""Listing within bounds: nobody is held up by a folder that somebody has filled with names."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

from distckpt.errors import StorageError

MOST_NAMES = 1 << 16
"""In folders that honestly hold few. Listing so many takes a fraction of a second."""

_Found = TypeVar("_Found")


def at_most(most: int, found: Iterable[_Found], where: str) -> list[_Found]:
    """All that is found. StorageError on ``where`` if it is more than ``most``, of which the rest is not looked at."""
    taken = list(islice(found, most + 1))
    if len(taken) > most:
        raise StorageError(
            where,
            f"holds more than {most} names, so it is not listed to its end. So many are not of distckpt: move away what "
            "does not belong there",
        )
    return taken
