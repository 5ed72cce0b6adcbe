"""Groups of readers that share a run's checkpoints: what an entry of a group's chain says."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import ClassVar, Literal, get_args

import msgspec

from distckpt.format.json.sealed import Sealed
from distckpt.format.limits import MAX_NUMBER, shown
from distckpt.format.names import is_attempt, is_name

FORMAT = 1
MAX_GROUP_BYTES = 16 << 20
MAX_TEXT = 1000
"""Characters of an error, or of the name of a worker."""

MAX_CLAIMS = 4096
MAX_RETURNED = 1024
MAX_SET_ASIDE = 128
MAX_RANGES = 4096
MAX_SECONDS = 86400.0

Mode = Literal["latest", "all"]
OnLag = Literal["skip", "hold", "block"]
Start = Literal["earliest", "latest"]
Kind = Literal["make", "claim", "ack", "release", "reject", "skip", "retry"]

MODES: tuple[str, ...] = get_args(Mode)
ON_LAGS: tuple[str, ...] = get_args(OnLag)
STARTS: tuple[str, ...] = get_args(Start)

_UNIQUE = re.compile(r"[0-9a-f]{32}")


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint as a group knows it; ``order`` is its place among the commits of the log."""

    order: int
    name: str
    number: int
    attempt: str

    def problems(self) -> Iterator[str]:
        """Why it makes no sense, whoever wrote it."""
        if not is_name(self.name) or not is_attempt(self.attempt):
            yield f"{shown(self.name)} or {shown(self.attempt)} is no name or attempt"
        if not (0 <= self.order <= MAX_NUMBER and 0 <= self.number <= MAX_NUMBER):
            yield "a number or an order is out of bounds"


class Claim(Item, frozen=True, forbid_unknown_fields=True):
    """``worker`` works on it, for the ``delivery``-th time that somebody does, under a lease of ``seconds``.

    It is dead once that lease is gone, or has not changed for so long by the clock of whoever watches it. ``token`` is
    unique for ever; ``failures`` counts the deliveries that were rejected.
    """

    delivery: int
    failures: int
    worker: str
    lease: str
    seconds: float
    token: str

    def problems(self) -> Iterator[str]:
        """See Item."""
        yield from super().problems()
        yield from _counts(self.delivery, self.failures)
        if not (_UNIQUE.fullmatch(self.token) and _UNIQUE.fullmatch(self.lease)):
            yield f"{shown(self.token)} or {shown(self.lease)} is no token or lease"
        if len(self.worker) > MAX_TEXT or not 0 < self.seconds <= MAX_SECONDS:
            yield "a worker's name is too long, or a lease's seconds are out of bounds"


class Returned(Item, frozen=True, forbid_unknown_fields=True):
    """To be delivered again, ``backoff`` seconds after whoever wants it has first seen this. ``error``: the last one's."""

    deliveries: int
    failures: int
    backoff: float
    error: str = ""

    def problems(self) -> Iterator[str]:
        """See Item."""
        yield from super().problems()
        yield from _counts(self.deliveries, self.failures)
        if len(self.error) > MAX_TEXT or not 0 <= self.backoff <= MAX_SECONDS:
            yield "an error is too long, or a back-off is out of bounds"


class SetAside(Item, frozen=True, forbid_unknown_fields=True):
    """Given up on, after so many deliveries and failures, with the last error; at ``time``, in epoch seconds."""

    deliveries: int
    failures: int
    error: str
    time: float

    def problems(self) -> Iterator[str]:
        """See Item."""
        yield from super().problems()
        yield from _counts(self.deliveries, self.failures)
        if len(self.error) > MAX_TEXT or not math.isfinite(self.time):
            yield "an error is too long, or a time is not a number"


class GroupState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a group knows.

    Every checkpoint up to the order ``through`` is done with, or in one of the lists; so are those of the ranges of
    orders in ``finished``, all of which lie above. Checkpoints of logs that did not count have the order 0, come first, by
    age; of them all up to ``through_attempt`` while ``through`` is 0. ``origin`` is the log's.

    ``set_aside`` has the last ones that were given up on, ``forgotten`` counts those before. ``skipped`` counts those that
    retention took because the group lagged, ``missed`` those that were gone when the group came to them.
    """

    mode: Mode
    start: Start
    max_backlog: int
    on_lag: OnLag
    max_attempts: int
    origin: str = ""
    through: int = 0
    through_attempt: str = ""
    finished: tuple[tuple[int, int], ...] = ()
    claims: tuple[Claim, ...] = ()
    returned: tuple[Returned, ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    acknowledged: int = 0
    last_acknowledged: Item | None = None
    skipped: int = 0
    last_skipped: Item | None = None
    missed: int = 0
    forgotten: int = 0

    def items(self) -> Iterator[Item]:
        """All that it has in its lists."""
        return itertools.chain(self.claims, self.returned, self.set_aside)

    def problems(self) -> Iterator[str]:
        """Why it makes no sense, whoever wrote it."""
        for item in (*self.items(), self.last_acknowledged, self.last_skipped):
            if item is not None:
                yield from item.problems()
        if len({item.attempt for item in self.items()}) < sum(1 for _ in self.items()):
            yield "it has a checkpoint in two places"
        counts = (self.through, self.acknowledged, self.skipped, self.missed, self.forgotten)
        if not all(0 <= count <= MAX_NUMBER for count in (*counts, self.max_backlog)):
            yield "a count is out of bounds"
        if not 1 <= self.max_attempts <= MAX_NUMBER:
            yield f"max_attempts {self.max_attempts} is out of bounds"
        if self.through_attempt and (self.through or not is_attempt(self.through_attempt)):
            yield f"{shown(self.through_attempt)} is no place to be at"
        if len(self.claims) > MAX_CLAIMS or len(self.returned) > MAX_RETURNED + MAX_CLAIMS + MAX_SET_ASIDE:
            yield "it has too many claims"
        if len(self.set_aside) > MAX_SET_ASIDE or len(self.finished) > MAX_RANGES or len(self.origin) > MAX_TEXT:
            yield "it has too much of what is done, or too long an origin"
        ends = [self.through, *itertools.chain.from_iterable(self.finished)]
        if any(last < first for first, last in self.finished) or ends != sorted(ends) or ends[-1] > MAX_NUMBER:
            yield "what is finished does not lie in order"


class GroupEntry(Sealed, frozen=True, forbid_unknown_fields=True):
    """One entry of a group's chain: ``by`` did what ``kind`` says. ``time`` is for people, in epoch seconds.

    ``commit_id`` is unique for ever; ``previous`` is that of the entry that this one was made from, '' for the first.
    """

    MAX_BYTES: ClassVar[int] = MAX_GROUP_BYTES

    format: int
    seq: int
    kind: Kind
    time: float
    by: str
    commit_id: str
    previous: str
    state: GroupState

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        if self.format != FORMAT:
            yield f"format version {self.format} inside version {FORMAT}"
        if not 1 <= self.seq <= MAX_NUMBER or not math.isfinite(self.time) or len(self.by) > MAX_TEXT:
            yield "its number, its time or who wrote it is out of bounds"
        if not _UNIQUE.fullmatch(self.commit_id) or not (self.previous == "" or _UNIQUE.fullmatch(self.previous)):
            yield "its commit id, or the one before, is none"
        yield from self.state.problems()


def _counts(deliveries: int, failures: int) -> Iterator[str]:
    if not (1 <= deliveries <= MAX_NUMBER and 0 <= failures <= MAX_NUMBER):
        yield "deliveries or failures are out of bounds"
