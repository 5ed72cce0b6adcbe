"""Where save rounds are found: which one a rank's join belongs to, by attempt, the unfinished ones, the latest finished.

Each rank counts its own saves (``order``), and a repeat is recognized by that. Which saves of different ranks are one
and the same, their counters do not tell: a rank that has missed a save would be one apart for ever. It is the number
that tells, and the sequence: every rank goes through the rounds in the order in which they began.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from distckpt.coordinator.machine.rounds import Place, SaveRound
from distckpt.coordinator.messages import Join
from distckpt.format.names import is_attempt

REMEMBERED_ROUNDS = 64
REMEMBERED_FAILURES = 1024


@dataclass(slots=True)
class _Line:
    """What is known of one rank: the latest order that it has joined with, and its rounds by order.

    ``due`` are earlier saves that it is still busy with but has not joined here, with their numbers: after a restart of
    the coordinator they may come later than a later one. ``committed`` is the latest order that is in the log.
    """

    latest: int
    committed: int
    due: dict[int, int | None] = field(default_factory=dict)
    joined: dict[int, SaveRound] = field(default_factory=dict)


class RoundBook:
    """The save rounds of one run.

    ``failed`` are attempts of this epoch that came to nothing before anybody began to seal them, newest last.
    """

    def __init__(self) -> None:
        self.failed: dict[str, None] = {}
        self._attempts: dict[str, SaveRound] = {}
        self._open: dict[str, SaveRound] = {}
        self._lines: dict[int, _Line] = {}
        self._over = 0

    def __iter__(self) -> Iterator[SaveRound]:
        """The unfinished rounds, latest first; safe while rounds end."""
        return iter(sorted(self._open.values(), key=lambda round: round.place, reverse=True))

    def __bool__(self) -> bool:
        return bool(self._open)

    @property
    def live(self) -> frozenset[str]:
        """The attempts of unfinished rounds."""
        return frozenset(self._open)

    def of(self, attempt: str) -> SaveRound | None:
        """The round of an attempt, finished or not."""
        return self._attempts.get(attempt)

    def saving(self) -> int:
        """How many unfinished rounds save rather than only prepare."""
        return sum(round.saves for round in self._open.values())

    # ---- which round a join belongs to -----------------------------------------------------------------------------

    def at(self, rank: int, order: int) -> SaveRound | None:
        """The round that the rank has joined with that order, finished or not."""
        return self._line(rank).joined.get(order)

    def is_over(self, rank: int, order: int) -> bool:
        """Whether a save that the rank has not joined here was over, for that rank, before one that it has joined."""
        line = self._line(rank)
        return order <= line.committed or (order <= line.latest and order not in line.due)

    def hear(self, rank: int, message: Join) -> list[SaveRound]:
        """The rank joins with that order for the first time; unfinished rounds that it has given up by that."""
        line, earlier = self._line(rank), dict(message.earlier)
        if message.order < line.latest:
            del line.due[message.order]
            return []
        line.latest = message.order
        line.due = {order: number for order, number in earlier.items() if order not in line.joined}
        return [
            round
            for order, round in line.joined.items()
            if order not in earlier and not round.over and not round.landed
        ]

    def find(self, rank: int, message: Join, began: float) -> SaveRound | None:
        """The round that the join belongs to: the first of its number that the rank has not joined or passed.

        It may have ended already without this rank. None if there is no such round; ``began`` is when the rank's save
        began, in monotonic seconds.
        """
        alike = [
            round for round in self._attempts.values() if round.number == message.number and rank not in round.orders
        ]
        rounds = sorted(alike, key=lambda round: round.place)
        for round in rounds:
            if message.attempt in round.formers:
                return round
        if self._is_unclear(rank, message.order, message.number):
            return None
        passed = self._passed(rank)
        for round in rounds:
            if round.over:
                if round.place > passed and round.awaits(rank, began):
                    return round
            elif not (message.attempt and round.formers) and not self._has_unclear(round, round.number):
                return round
        return None

    def missed(self, rank: int, number: int | None) -> Place | None:
        """Where the latest round of that number was that was given up because the rank had not come to it, and is yet to."""
        passed = self._passed(rank)
        alike = (round.place for round in self._attempts.values() if round.number == number and rank in round.absent)
        return max((place for place in alike if place > passed), default=None)

    def passed_by(self, round: SaveRound) -> dict[int, int | None]:
        """Ranks that have gone on to later rounds without joining this one, each with the number that it joined last."""
        return {
            rank: line.joined[max(line.joined)].number
            for rank, line in self._lines.items()
            if rank not in round.orders and round.number not in line.due.values() and self._passed(rank) > round.place
        }

    def enter(self, round: SaveRound, rank: int, message: Join) -> list[SaveRound]:
        """The rank has joined a round; unfinished ones before it that the rank will not join any more by that.

        A round that goes on with an attempt from before the coordinator was replaced takes over its place.
        """
        line = self._line(rank)
        line.joined[message.order] = round
        round.orders[rank] = message.order
        if is_attempt(message.attempt) and message.attempt != round.attempt:
            round.goes_on_with(message.attempt)
        return [
            other
            for other in self
            if other.place < round.place
            and rank not in other.orders
            and other.number not in line.due.values()
            and not self._has_unclear(other, round.number)
        ]

    def in_sequence(self, round: SaveRound) -> bool:
        """Whether no rank has had a later save of its own committed."""
        return all(order > self._line(rank).committed for rank, order in round.orders.items())

    def _line(self, rank: int) -> _Line:
        line = self._lines.get(rank)
        if line is None:
            line = self._lines[rank] = _Line(self._over - 1, self._over - 1)
        return line

    def _passed(self, rank: int) -> Place:
        """The place of the latest round that the rank has joined."""
        return max((round.place for round in self._line(rank).joined.values()), default=(0, "", ""))

    def _is_unclear(self, rank: int, order: int, number: int | None) -> bool:
        """Whether the rank is still to join an earlier save of the same number, to which a round may belong."""
        return any(due < order and of == number for due, of in self._line(rank).due.items())

    def _has_unclear(self, round: SaveRound, number: int | None) -> bool:
        """Whether a rank of ``round`` is still to join a save of that number which it began before this one."""
        busy = (rank for rank, line in self._lines.items() if line.due and rank in round.orders)
        return any(self._is_unclear(rank, round.orders[rank], number) for rank in busy)

    # ---- from begin to end -----------------------------------------------------------------------------------------

    def must_wait(self, round: SaveRound) -> bool:
        """Whether another save comes first: an earlier one that all ranks have joined, or one being sealed already."""
        others = (other for other in self._open.values() if other is not round and other.saves)
        return any(other.landed or (other.place < round.place and other.all_joined) for other in others)

    def committed(self, round: SaveRound) -> list[SaveRound]:
        """The round is in the log. Unfinished saves that come before it, or that a rank of it has left out, are over."""
        for rank, order in round.orders.items():
            line = self._line(rank)
            line.committed = max(line.committed, order)
            line.due = {due: number for due, number in line.due.items() if due > order}
        return [other for other in self if other.place < round.place and other.saves]

    def add(self, round: SaveRound) -> None:
        """A round begins."""
        self._attempts[round.attempt] = self._open[round.attempt] = round

    def close(self, round: SaveRound, *, failed: bool) -> None:
        """A round has ended, and may have ``failed`` before sealing began. The oldest finished ones are forgotten."""
        self._open.pop(round.attempt, None)
        if failed:
            self.failed[round.attempt] = None
        if len(self.failed) > REMEMBERED_FAILURES:
            del self.failed[next(iter(self.failed))]
        if len(self._attempts) - len(self._open) > REMEMBERED_ROUNDS:
            self._forget_oldest()

    def begin(self, saves: int) -> None:
        """A run begins, or goes on after so many saves. All rounds of another must have been closed."""
        self._attempts.clear()
        self._lines.clear()
        self._over = saves

    def _forget_oldest(self) -> None:
        ended = (round for round in self._attempts.values() if round.attempt not in self._open)
        gone = min(ended, key=lambda round: round.place)
        del self._attempts[gone.attempt]
        for rank, order in gone.orders.items():
            self._line(rank).joined.pop(order, None)
