"""What is derived from the log: the ``checkpoint`` file. It follows each change, and holds up nobody but who asks for it."""

from __future__ import annotations

from distckpt.coordinator.machine.actions import Publish, Published
from distckpt.coordinator.machine.desk import Desk
from distckpt.coordinator.messages import Accepted
from distckpt.format.json.log import Entry


class Publishing:
    """Has states published, one at a time; of those that came meanwhile only the newest."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._next: Entry | None = None
        self._flight: Entry | None = None
        self._wanted = 0
        self._waiting: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether a state is being published."""
        return self._flight is not None

    def publish(self, entry: Entry) -> None:
        """The ``checkpoint`` file shall say what this entry says."""
        self._next, self._wanted = entry, entry.seq
        self._advance()

    def published(self, event: Published) -> None:
        """It does, or could not be made to: whoever waited for it, or for one before, is answered."""
        if self._flight is None or event.entry.commit_id != self._flight.commit_id:
            return
        self._flight = None
        for ticket, seq in list(self._waiting.items()):
            if seq <= event.entry.seq:
                self._desk.answer(ticket, Accepted())
        self._advance()

    def await_published(self, ticket: int) -> None:
        """A rank wants to hear when the file says what has been committed so far."""
        if self.busy:
            self._desk.hold(ticket, self._waiting, self._wanted)
        else:
            self._desk.answer(ticket, Accepted())

    def _advance(self) -> None:
        if self._flight is None and self._next is not None:
            self._flight, self._next = self._next, None
            self._desk.emit(Publish(self._flight))
