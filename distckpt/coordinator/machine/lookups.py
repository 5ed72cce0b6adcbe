"""What ranks are told of attempts that only a page of the log may know."""

from __future__ import annotations

from collections.abc import Callable

from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.library import Found, Library
from distckpt.coordinator.machine.records import find_number
from distckpt.coordinator.machine.roundbook import RoundBook
from distckpt.coordinator.messages import (
    Accepted,
    AwaitPlan,
    Committed,
    Describe,
    Fail,
    FromRank,
    Join,
    Receipt,
    Refused,
    Reply,
)
from distckpt.errors import CheckpointNotFoundError
from distckpt.format.names import checkpoint_folder


class Lookups:
    """Has pages read for ranks that ask about an old attempt. Hardly any do: they speak of one of the last."""

    def __init__(self, desk: Desk, ledger: Ledger, library: Library, book: RoundBook) -> None:
        self._desk = desk
        self._ledger = ledger
        self._library = library
        self._book = book
        self._asking: dict[int, FromRank] = {}

    def hold(self, ticket: int, envelope: FromRank, serve: Callable[[], None]) -> bool:
        """Whether a page has to be read before the rank can be told what became of its attempt.

        Then it will be: it was committed, or ``serve`` is called.
        """
        request, state = envelope.request, self._ledger.sound
        if not state.pages or not isinstance(request, Join | Describe | AwaitPlan | Receipt | Fail):
            return False
        attempt = request.attempt
        if not attempt or self._book.of(attempt) is not None or attempt in state.known():
            return False
        pages = tuple(page for page in state.pages if page.may_have_attempt(attempt))
        if pages:
            self._desk.hold(ticket, self._asking, envelope)
            self._library.read(pages, lambda found: self._answer(ticket, attempt, found, serve))
        return bool(pages)

    def pinned(self, number: int, name: str) -> Reply:
        """What is told who has asked for a pin, or for none, of this number, now that the log says so."""
        if find_number(self._ledger.seen, number, name) is not None:
            return Accepted()
        lost = self._library.errors(page for page in self._ledger.state.pages if page.may_have_number(number))
        path = f"{self._desk.directory}/{checkpoint_folder(name, number)}"
        return Refused(next(iter(lost), CheckpointNotFoundError(path, "no such checkpoint is committed")))

    def _answer(self, ticket: int, attempt: str, found: Found, serve: Callable[[], None]) -> None:
        envelope = self._asking.get(ticket)
        if envelope is None:
            return  # nobody waits any more
        record = next((one for records in found.values() for one in records if one.attempt == attempt), None)
        if record is not None:
            self._desk.answer(ticket, Accepted() if isinstance(envelope.request, Fail) else Committed(record))
        else:
            self._desk.forget(ticket)
            serve()
