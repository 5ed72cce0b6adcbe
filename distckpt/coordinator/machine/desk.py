"""What the parts of a machine share: the time of this step, the actions it asks for, and who waits for an answer."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from typing import Any

from distckpt.coordinator.machine.actions import Action, Answer
from distckpt.coordinator.messages import Reply


class Desk:
    """Open tickets and outgoing actions. ``now`` is wall-clock time, ``mono`` never goes back; both in seconds."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.now = 0.0
        self.mono = 0.0
        self._actions: list[Action] = []
        self._shelves: dict[int, MutableMapping[int, Any]] = {}

    def begin(self, now: float, mono: float) -> None:
        """A step begins at this time. Monotonic time never goes back, whatever is passed."""
        self.now = now
        self.mono = max(mono, self.mono)

    def take(self) -> list[Action]:
        """The actions since the last call."""
        actions, self._actions = self._actions, []
        return actions

    def emit(self, action: Action) -> None:
        """Ask the shell for ``action``."""
        self._actions.append(action)

    def hold(self, ticket: int, shelf: MutableMapping[int, Any], value: Any) -> None:
        """Keep a ticket on ``shelf`` until it is answered or forgotten; then it leaves the shelf by itself."""
        shelf[ticket] = value
        self._shelves[ticket] = shelf

    def answer(self, ticket: int, reply: Reply) -> None:
        """Send the one answer that a ticket gets."""
        self.forget(ticket)
        self.emit(Answer(ticket, reply))

    def answer_shelf(self, shelf: MutableMapping[int, Any], reply: Reply) -> None:
        """Send the same answer to every ticket on ``shelf``."""
        for ticket in list(shelf):
            self.answer(ticket, reply)

    def answer_everyone(self, reply: Reply) -> None:
        """Send the same answer to every open ticket."""
        for ticket in list(self._shelves):
            self.answer(ticket, reply)

    def forget(self, ticket: int) -> None:
        """Take a ticket off its shelf without an answer."""
        shelf = self._shelves.pop(ticket, None)
        if shelf is not None:
            shelf.pop(ticket, None)


class Identities:
    """Ids that are unique for ever, given that ``claim_id`` is, and the same again for the same sequence of calls."""

    def __init__(self, claim_id: str) -> None:
        self._claim = hashlib.sha256(claim_id.encode()).hexdigest()[:24]
        self._made = 0

    def attempt(self, epoch: int) -> str:
        """The id of a new attempt. Ids of one epoch sort by age (``names.attempt_age``)."""
        self._made += 1
        return f"e{epoch}-{self._made:08x}{self._claim}"

    def commit(self) -> str:
        """The id of a new log entry."""
        self._made += 1
        return f"{self._made:08x}{self._claim}"
