"""What the machine hears and what it asks for. The shell turns actions into effects and their results into events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from distckpt.coordinator.machine.following import Followed
from distckpt.coordinator.messages import Receipt, Reply, Request
from distckpt.errors import BlockedError, DistckptError
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.page import ListName, PageRef
from distckpt.format.json.report import Reported


class Plan(Protocol):
    """Who writes what, for one attempt. Opaque to the machine but for this."""

    @property
    def plan_id(self) -> str:
        """Unique for the descriptions and the assignment it was made from."""

    @property
    def world_size(self) -> int:
        """How many ranks it covers."""

    def rows(self, rank: int) -> bytes:
        """Rows of the rank's description that it writes, in order: int32, little endian."""

    def row_count(self, rank: int) -> int:
        """How many rows that is."""


# ---- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A request came in; ``ticket`` is where its answer goes."""

    ticket: int
    request: Request


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Nobody waits for ``ticket`` any more (its caller is gone)."""

    ticket: int


@dataclass(frozen=True, slots=True)
class TailRead:
    """The newest entry that can be read (None in a fresh directory), and ``seq``, the highest number in the log.

    ``complete`` are checkpoints of the newest entry's epoch whose manifest and every shard are on storage but which
    that entry's state does not know: candidates for rolling forward, in any order.
    """

    seq: int
    entry: Entry | None
    complete: tuple[CheckpointRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Appended:
    """The entry is on storage, durable, and a listing made after that shows ``newest`` as the highest number."""

    entry: Entry
    newest: int


@dataclass(frozen=True, slots=True)
class NameTaken:
    """Another entry is at that number: ``found``, or None if it cannot be read; ``newest`` is the highest number."""

    entry: Entry
    found: Entry | None
    newest: int


@dataclass(frozen=True, slots=True)
class AppendUnknown:
    """The store answered neither yes nor no to this append; or something is in the way (``blocked``) until it is moved."""

    entry: Entry
    reason: str
    blocked: BlockedError | None = None


@dataclass(frozen=True, slots=True)
class AppendRefused:
    """No reader would take this entry, so it was not written and never will be: ``reason``."""

    entry: Entry
    reason: str


@dataclass(frozen=True, slots=True)
class NewestRead:
    """A listing of the log shows ``newest`` as the highest number; None if there was none, for ``reason``."""

    newest: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PagesRead:
    """The records of the pages that were ``asked`` for, by id; and why others of them could not be read."""

    asked: int
    pages: Mapping[str, tuple[CheckpointRecord, ...]] = field(repr=False)
    failed: Mapping[str, DistckptError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PageWritten:
    """The page is durable, and ``ref`` refers to it; None if nobody knows whether it is there: then it is not needed."""

    page: str
    ref: PageRef | None


@dataclass(frozen=True, slots=True)
class PlanMade:
    """The plan of ``attempt``."""

    attempt: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class Sealed:
    """Every shard of ``attempt`` was seen on the store, index and manifest are durable: it can be committed."""

    attempt: str
    manifest_size: int
    manifest_crc32c: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """Making the plan of ``attempt``, or sealing it, failed for good."""

    attempt: str
    error: DistckptError


@dataclass(frozen=True, slots=True)
class LeasesRead:
    """Attempts that live leases name now. ``failed`` is why it could not be read who needs what ('' if it could).

    ``pinned`` are those of them that somebody had pinned before they were retired, if they are. ``followed`` is what
    groups of readers want, and ``reports`` what has been reported, oldest first: read after the groups, so that what a
    group is done with is among them or in the log.
    """

    attempts: frozenset[str]
    failed: str = ""
    pinned: frozenset[str] = frozenset()
    followed: Followed = field(default=Followed(), repr=False)
    reports: tuple[Reported, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class SkipsTold:
    """The groups have been told what they do not get; or, if not ``done``, perhaps not all of them."""

    done: bool


@dataclass(frozen=True, slots=True)
class Deleted:
    """Nothing of these attempts is left on storage. Those that could not be deleted are absent; they stay retiring."""

    attempts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """The ``checkpoint`` file says what the entry says; or it could not be made to, and the next one may."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class RoomMade:
    """An urgent collection of garbage has come to its end, whatever it could delete."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Asked
    | Forgotten
    | TailRead
    | Appended
    | NameTaken
    | AppendUnknown
    | AppendRefused
    | NewestRead
    | PagesRead
    | PageWritten
    | PlanMade
    | Sealed
    | StepFailed
    | LeasesRead
    | SkipsTold
    | Deleted
    | Published
    | RoomMade
    | Tick
)


# ---- actions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Send ``reply`` to whoever holds ``ticket``."""

    ticket: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class ReadTail:
    """Read the log's tail; TailRead follows."""


@dataclass(frozen=True, slots=True)
class Append:
    """Put the entry if absent, then list; Appended, NameTaken, AppendUnknown or AppendRefused follows."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class ReadNewest:
    """List the log, after every append that was asked for; NewestRead follows."""


@dataclass(frozen=True, slots=True)
class ReadPages:
    """Read these pages of the log; PagesRead follows."""

    asked: int
    pages: tuple[PageRef, ...]


@dataclass(frozen=True, slots=True)
class WritePage:
    """Put records of one list into a page of their own, if there is none of that id; PageWritten follows."""

    page: str
    of: ListName
    records: tuple[CheckpointRecord, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Plan ``attempt`` from every rank's description; ``staged`` fixes rows of ranks that copied theirs already.

    ``fresh`` are the ranks that described in this very save: the values that the others described are of an earlier
    one. PlanMade or StepFailed follows.
    """

    attempt: str
    number: int | None
    descriptions: Mapping[int, bytes] = field(repr=False)
    staged: Mapping[int, bytes] = field(repr=False)
    fresh: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Seal:
    """Check every shard on the store, write index and manifest; Sealed or StepFailed follows."""

    attempt: str
    name: str
    number: int
    epoch: int
    time: float
    plan: Plan
    receipts: Mapping[int, Receipt] = field(repr=False)
    hosts: Mapping[int, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReadLeases:
    """Read the live leases, then what groups of readers want of ``state``, then reports; LeasesRead follows.

    ``named`` are groups that retention waits for.
    """

    state: State = field(repr=False)
    named: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TellSkips:
    """Say to each group, in its own record, which of those that it wants it does not get; SkipsTold follows."""

    skips: Mapping[str, tuple[CheckpointRecord, ...]]


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete these checkpoints' objects, manifest first, then the ``reports`` on them, by path; Deleted follows."""

    records: tuple[CheckpointRecord, ...]
    reports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeleteReports:
    """Delete reports that the log has by now. Nothing follows.

    Those of one attempt in this order, and none after one that stays: whoever folds what is left comes to the same.
    """

    reports: tuple[Reported, ...]


@dataclass(frozen=True, slots=True)
class CollectGarbage:
    """Delete attempts of this name that came to nothing and are old enough. Nothing follows, or RoomMade if ``urgent``.

    What may be in one of ``pages`` is known too, and all that may be in one that cannot be read. Of
    epochs before ``epoch``: all that are not ``known``; of ``epoch`` itself: only those in ``failed``, which have
    no manifest and never will; of later epochs: none. These rules hold however late the action is performed: what it
    deletes can never be committed. ``live`` are attempts in work. If it is ``urgent``, because the store is full, those
    need not be old that a coordinator of this directory's log has begun. Pages go that no entry of the log refers to: of
    epochs before, and those of ``epoch`` that are ``dropped``.
    """

    name: str
    known: frozenset[str]
    live: frozenset[str]
    epoch: int
    failed: frozenset[str] = frozenset()
    urgent: bool = False
    pages: tuple[PageRef, ...] = ()
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Publish:
    """Refresh the derived ``checkpoint`` file from the entry's state and prune log entries that nobody needs.

    Published follows.
    """

    entry: Entry


@dataclass(frozen=True, slots=True)
class Exit:
    """This coordinator has come to its end: ``reason`` says why (fenced, or idle). Nothing follows."""

    reason: str


Action = (
    Answer
    | ReadTail
    | Append
    | ReadNewest
    | ReadPages
    | WritePage
    | MakePlan
    | Seal
    | ReadLeases
    | TellSkips
    | Delete
    | DeleteReports
    | CollectGarbage
    | Publish
    | Exit
)
