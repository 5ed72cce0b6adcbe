"""States with pages: which records go into one, and what a state is with those of some pages at hand. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import crc32c
import msgspec

from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.page import MAX_PAGE_BYTES, ListName, PageRef
from distckpt.format.json.sealed import Sealed, seal
from distckpt.format.names import attempt_age

FORMAT = 1

Records = tuple[CheckpointRecord, ...]
Place = tuple[int, tuple[int, str]]


class Page(Sealed, frozen=True, forbid_unknown_fields=True):
    """Older records of one list of a log, in its order."""

    MAX_BYTES: ClassVar[int] = MAX_PAGE_BYTES

    format: int
    id: str
    records: Records

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        for record in self.records:
            yield from record.problems()
        if len({record.attempt for record in self.records}) < len(self.records):
            yield "it lists an attempt twice"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many records stay out of pages for certain, how many make a page, and how many the largest one has.

    So many pages of about one size as ``together`` says are put together, until they are as large as the largest.
    """

    newest: int = 32
    page: int = 64
    most: int = 4096
    together: int = 8


SIZES = Sizes()


def place(record: CheckpointRecord) -> Place:
    """Where an active record stands among the others: in the order of commits, and before that of attempts."""
    return record.order, attempt_age(record.attempt)


def opened(state: State, pages: Mapping[str, Records]) -> State:
    """The state with the records of these pages, by id, in its own lists, in their places. Other pages stay as they are.

    What contradicts the records at hand, because a page could not be read when it had to be known, gives way: what is
    retiring is so wherever it stands, and of two active ones of one name and number the older is preserved.
    """
    refs = [page for page in state.pages if page.id in pages]
    if not refs:
        return state
    known = state.known()
    parts = {
        name: [[_no_younger(record, page) for record in pages[page.id] if record.attempt not in known]
               for page in refs if page.of == name]
        for name in ("active", "preserved")
    }  # fmt: skip
    active = tuple(heapq.merge(*parts["active"], state.active, key=place))
    youngest = {(record.name, record.number): record for record in active}
    replaced = tuple(record for record in active if youngest[record.name, record.number] is not record)
    return msgspec.structs.replace(
        state,
        active=tuple(record for record in active if record not in replaced) if replaced else active,
        preserved=(*(record for part in parts["preserved"] for record in part), *state.preserved, *replaced),
        pages=tuple(page for page in state.pages if page.id not in pages),
    )


def _no_younger(record: CheckpointRecord, page: PageRef) -> CheckpointRecord:
    return record if record.time <= page.times[1] else msgspec.structs.replace(record, time=page.times[1])


def sealed_page(page: str, records: Records) -> bytes:
    """The page as it is stored. ValueError if no reader would take it."""
    return seal(Page(FORMAT, page, records))


def ref_of(page: str, of: ListName, records: Records, size: int, crc: int) -> PageRef:
    """The reference to a page of these records, which has so many bytes with that CRC32C."""
    ages = sorted((record.attempt for record in records), key=attempt_age)
    return PageRef(
        id=page,
        of=of,
        count=len(records),
        size=size,
        crc32c=crc,
        numbers=_bounds([record.number for record in records]),
        orders=_bounds([record.order for record in records]),
        times=(min(record.time for record in records), max(record.time for record in records)),
        attempts=(ages[0], ages[-1]),
    )


def _bounds(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def fits(ref: PageRef, data: bytes) -> bool:
    """Whether these bytes are those of the page."""
    return len(data) == ref.size and crc32c.crc32c(data) == ref.crc32c


def turned(state: State, ref: PageRef, records: Records) -> State:
    """The state with these records in the page of ``ref`` instead of its own list."""
    gone = {record.attempt for record in records}
    left = tuple(record for record in getattr(state, ref.of) if record.attempt not in gone)
    return msgspec.structs.replace(state, **{ref.of: left}, pages=(*state.pages, ref))


def next_page(state: State, sizes: Sizes, *, active: bool) -> tuple[ListName, Records] | None:
    """What of a state should go into a page now: a list's name and records of it, or None. ``active`` ones, if wished.

    What may go is older than the last active one, and in one list only; so the newest is always at hand, and what a
    coordinator finds sealed and not committed is in no page.
    """
    last = attempt_age(state.active[-1].attempt) if state.active else None
    lists: tuple[ListName, ...] = ("active", "preserved") if active else ("preserved",)
    for name in lists:
        records: Records = getattr(state, name)
        if len(records) < sizes.newest + sizes.page:
            continue
        both = {record.attempt for record in (state.preserved if name == "active" else state.active)}
        able = [
            record.attempt not in both and (last is None or attempt_age(record.attempt) < last) for record in records
        ]
        chosen = _run(records, able, sizes) if name == "active" else _oldest(records, able, sizes)
        if len(chosen) >= sizes.page:
            return name, chosen
    return None


def _run(records: Records, able: Sequence[bool], sizes: Sizes) -> Records:
    """The first run of ascending places, long enough, that is after all before it and before all after it."""
    places = [place(record) for record in records]
    highest = [(-1, (-1, "")), *accumulate(places, max)]
    lowest = [*list(accumulate(reversed(places), min))[::-1], None]
    cuts = [low is None or high < low for high, low in zip(highest, lowest, strict=True)]
    begin = end = 0
    for at in range(len(records) - sizes.newest):
        if not able[at] or not cuts[at] or end - begin == sizes.most:
            if end - begin >= sizes.page:
                break
            begin = at + 1 if not able[at] or not cuts[at] else at
        end = at + 1
    while end > begin and not cuts[end]:
        end -= 1
    return records[begin:end]


def _oldest(records: Records, able: Sequence[bool], sizes: Sizes) -> Records:
    """The oldest that may go, in their order; the newest stay."""
    ages = sorted(attempt_age(record.attempt) for record in records)
    stay = ages[-sizes.newest]
    found = [record for record, may in zip(records, able, strict=True) if may and attempt_age(record.attempt) < stay]
    last = sorted(attempt_age(record.attempt) for record in found)[: sizes.most][-1:]
    return tuple(record for record in found if attempt_age(record.attempt) <= last[0])


def small_pages(state: State, sizes: Sizes, *, active: bool) -> tuple[PageRef, ...]:
    """Pages that are to be put together, because there are too many of about one size; () as long as there are not."""
    lists: tuple[ListName, ...] = ("active", "preserved") if active else ("preserved",)
    for name in lists:
        size = sizes.page
        while size * sizes.together <= sizes.most:
            larger = size * sizes.together
            alike = [page for page in state.pages if page.of == name and size <= page.count < larger]
            if len(alike) >= sizes.together:
                return tuple(alike[: sizes.together])
            size *= sizes.together
    return ()
