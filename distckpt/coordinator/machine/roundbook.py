"""Where save rounds are found: by their order, by their attempt, the unfinished ones, and the latest finished ones."""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.coordinator.machine.rounds import SaveRound

REMEMBERED_ROUNDS = 64
REMEMBERED_FAILURES = 1024


class RoundBook:
    """The save rounds of one run.

    ``failed`` are attempts of this epoch that came to nothing before anybody began to seal them, newest last.
    """

    def __init__(self) -> None:
        self.failed: dict[str, None] = {}
        self._rounds: dict[int, SaveRound] = {}
        self._attempts: dict[str, SaveRound] = {}
        self._open: dict[int, SaveRound] = {}
        self._over = 0

    def __iter__(self) -> Iterator[SaveRound]:
        """The unfinished rounds, latest order first; safe while rounds end."""
        return iter(sorted(self._open.values(), key=lambda round: round.order, reverse=True))

    def __bool__(self) -> bool:
        return bool(self._open)

    @property
    def live(self) -> frozenset[str]:
        """The attempts of unfinished rounds."""
        return frozenset(round.attempt for round in self._open.values())

    def at(self, order: int) -> SaveRound | None:
        """The round of the save with that order, finished or not."""
        return self._rounds.get(order)

    def of(self, attempt: str) -> SaveRound | None:
        """The round of an attempt, finished or not."""
        return self._attempts.get(attempt)

    def is_over(self, order: int) -> bool:
        """Whether that save was finished, or overtaken, before what is remembered."""
        return order < self._over

    def saving(self) -> int:
        """How many unfinished rounds save rather than only prepare."""
        return sum(round.saves for round in self._open.values())

    def must_wait(self, round: SaveRound) -> bool:
        """Whether another save comes first: an earlier one that all ranks have joined, or one being sealed already."""
        others = (other for other in self._open.values() if other is not round and other.saves)
        return any(other.landed or (other.order < round.order and other.all_joined) for other in others)

    def overtaken(self, round: SaveRound) -> list[SaveRound]:
        """Unfinished saves that come before ``round``. No round of theirs, or of its own, can be opened any more."""
        self._over = max(self._over, round.order + 1)
        return [other for other in self if other.order < round.order and other.saves]

    def add(self, round: SaveRound) -> None:
        """A round begins."""
        self._rounds[round.order] = self._attempts[round.attempt] = self._open[round.order] = round

    def close(self, round: SaveRound, *, failed: bool) -> None:
        """A round has ended, and may have ``failed`` before sealing began. The oldest finished ones are forgotten."""
        self._open.pop(round.order, None)
        if failed:
            self.failed[round.attempt] = None
        if len(self.failed) > REMEMBERED_FAILURES:
            del self.failed[next(iter(self.failed))]
        if len(self._rounds) - len(self._open) > REMEMBERED_ROUNDS:
            self._forget_oldest()

    def begin(self, saves: int) -> None:
        """A run begins, or goes on after so many saves. All rounds of another must have been closed."""
        self._rounds.clear()
        self._attempts.clear()
        self._over = saves

    def _forget_oldest(self) -> None:
        order = min(order for order in self._rounds if order not in self._open)
        gone = self._rounds.pop(order)
        del self._attempts[gone.attempt]
        self._over = max(self._over, order + 1)
