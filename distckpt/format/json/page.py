"""Pages: older records of a log, out of the way of its entries, which refer to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from distckpt.format.limits import MAX_CRC32C, MAX_NUMBER, shown
from distckpt.format.names import attempt_age, is_attempt

MAX_PAGE_BYTES = 64 << 20

ListName = Literal["active", "preserved"]


class PageRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page that a state refers to: how to check it, and what is known of its records without reading it.

    It has ``count`` records of the list ``of``, whose ``numbers``, ``orders``, ``times`` and ``attempts`` (by age) lie
    between these two each, both included. A record that is younger than the later of ``times`` is as old as that: a clock
    has gone back since it was written.
    """

    id: str
    of: ListName
    count: int
    size: int
    crc32c: int
    numbers: tuple[int, int]
    orders: tuple[int, int]
    times: tuple[float, float]
    attempts: tuple[str, str]

    @property
    def first(self) -> tuple[int, tuple[int, str]]:
        """No record in it has an earlier place in its list than this (``paging.place``)."""
        return self.orders[0], attempt_age(self.attempts[0])

    def may_have_number(self, number: int) -> bool:
        """Whether a checkpoint of this number may be in it."""
        return self.numbers[0] <= number <= self.numbers[1]

    def may_have_attempt(self, attempt: str) -> bool:
        """Whether this attempt may be in it."""
        return is_attempt(attempt) and (
            attempt_age(self.attempts[0]) <= attempt_age(attempt) <= attempt_age(self.attempts[1])
        )

    def problems(self) -> Iterator[str]:
        """Why it makes no sense, whoever wrote it."""
        (low, high), (first, last), (begin, end) = self.numbers, self.orders, self.times
        oldest, youngest = self.attempts
        if not (is_attempt(self.id) and is_attempt(oldest) and is_attempt(youngest)):
            yield f"{shown(self.id)} is no page, or its attempts are none"
        elif oldest != youngest and attempt_age(oldest) > attempt_age(youngest):
            yield f"attempts of page {self.id} are out of order"
        if not (
            1 <= self.count <= MAX_PAGE_BYTES and 0 < self.size <= MAX_PAGE_BYTES and 0 <= self.crc32c <= MAX_CRC32C
        ):
            yield f"count, size or CRC32C of page {shown(self.id)} is out of bounds"
        if not (0 <= low <= high <= MAX_NUMBER and 0 <= first <= last <= MAX_NUMBER):
            yield f"numbers or orders of page {shown(self.id)} are out of bounds"
        if not (math.isfinite(begin) and math.isfinite(end) and begin <= end):
            yield f"times of page {shown(self.id)} are out of bounds"
