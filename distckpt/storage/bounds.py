"""Listing and reading within bounds: a folder that somebody has filled with names, an object that is too short."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

from distckpt.errors import DamagedError, StorageError

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


def require_within(size: int, position: int, nbytes: int, where: str) -> None:
    """Make sure that an object of ``size`` bytes has ``nbytes`` from ``position`` on. DamagedError on ``where`` if not.

    ValueError for a negative position.
    """
    if position < 0:
        raise ValueError(f"position {position} is negative")
    if position + nbytes > size:
        raise DamagedError(where, f"ends after {size} bytes, {position + nbytes - size} more were expected")
