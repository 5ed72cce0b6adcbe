"""Pages of the log, read when something hangs on what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from distckpt.coordinator.machine.actions import PagesRead, ReadPages
from distckpt.coordinator.machine.desk import Desk
from distckpt.errors import DistckptError
from distckpt.format.json.log import State
from distckpt.format.json.page import PageRef
from distckpt.format.json.paging import Records

Found = Mapping[str, Records]

TRY_AGAIN = 600.0
"""After so many seconds a page that could not be read is tried again; until then everything goes on without it."""


class Library:
    """Has pages read, and knows which cannot be. Keeps none of them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._asked = 0
        self._waiting: dict[int, Callable[[Found], None]] = {}
        self._failed: dict[str, tuple[float, DistckptError]] = {}

    @property
    def busy(self) -> bool:
        """Whether pages are being read."""
        return bool(self._waiting)

    def read(self, pages: tuple[PageRef, ...], then: Callable[[Found], None]) -> None:
        """Call ``then`` with the records of those of the pages that can be read, by id."""
        self._asked += 1
        self._waiting[self._asked] = then
        self._desk.emit(ReadPages(self._asked, pages))

    def pages_read(self, event: PagesRead) -> None:
        """They are there, or cannot be read."""
        for page, error in event.failed.items():
            self._failed[page] = (self._desk.mono, error)
        for page in event.pages:
            self._failed.pop(page, None)
        then = self._waiting.pop(event.asked, None)
        if then is not None:
            then(event.pages)

    def error(self, page: PageRef) -> DistckptError | None:
        """Why a page could not be read of late; None if nothing is known against it."""
        failed_at, error = self._failed.get(page.id, (0.0, None))
        return error if error is not None and failed_at + TRY_AGAIN > self._desk.mono else None

    def errors(self, pages: Iterable[PageRef]) -> tuple[DistckptError, ...]:
        """Why some of these pages could not be read of late."""
        return tuple(error for page in pages if (error := self.error(page)) is not None)

    def sound(self, state: State) -> State:
        """The state without the pages that cannot be read."""
        left = tuple(page for page in state.pages if self.error(page) is None)
        return state if len(left) == len(state.pages) else msgspec.structs.replace(state, pages=left)
