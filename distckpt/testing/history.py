"""What happened in a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from distckpt.format.json.group import Claim, GroupEntry
from distckpt.format.json.log import CheckpointRecord, Entry

MANIFEST = "manifest"
INDEX = "index"


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard's content: which rank wrote it, in which of that rank's saves, and which ``rows`` of the ``chunks`` it held."""

    run: int
    order: int
    number: int
    rank: int
    rows: bytes
    chunks: int


@dataclass(frozen=True, slots=True)
class Whole:
    """An index's and a manifest's content: the rows that every rank's shard should hold, out of ``chunks`` in all."""

    number: int
    rows: Mapping[int, bytes]
    chunks: int
    time: float


Content = Piece | Whole


@dataclass(frozen=True, slots=True)
class Logged:
    """``who`` created an entry. ``heard``: it was told, or would have been; False if the write landed long after.

    In the entry's state here is also what the entry has in ``pages``, so many.
    """

    who: str
    entry: Entry
    heard: bool = True
    overwrote: bool = False
    pages: int = 0


@dataclass(frozen=True, slots=True)
class LostPage:
    """An entry that is in the log refers to a page that ``who`` has deleted, or did not find."""

    who: str
    page: str


@dataclass(frozen=True, slots=True)
class Wrote:
    """An object of an attempt was created, or ``overwrote`` another."""

    attempt: str
    name: str
    content: Content
    overwrote: bool = False


@dataclass(frozen=True, slots=True)
class Erased:
    """``who`` deleted an object of an attempt."""

    who: str
    attempt: str
    name: str


@dataclass(frozen=True, slots=True)
class Promised:
    """``who`` told a rank that its save is committed."""

    who: str
    rank: int
    record: CheckpointRecord


@dataclass(frozen=True, slots=True)
class Held:
    """A reader has written a lease and seen after that that the checkpoint is not retiring."""

    reader: str
    attempt: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """The reader's lease is gone, or has expired."""

    reader: str


@dataclass(frozen=True, slots=True)
class Returned:
    """A reader returned the bytes of a checkpoint: by name, the shards that it had read."""

    reader: str
    record: CheckpointRecord
    shards: Mapping[str, Content]


@dataclass(frozen=True, slots=True)
class GroupLogged:
    """As ``Logged``, of an entry of the chain of ``group``."""

    group: str
    who: str
    entry: GroupEntry
    heard: bool = True
    overwrote: bool = False


@dataclass(frozen=True, slots=True)
class GroupsRead:
    """A coordinator has read how these groups stand, before it decides what retires."""

    who: str
    groups: frozenset[str]


@dataclass(frozen=True, slots=True)
class Settled:
    """A worker of ``group`` was told that what it did with its claim counts, or, if not ``counts``, that it does not.

    ``how``: "ack", "release" or "reject". Who never hears what became of it is told neither.
    """

    worker: str
    group: str
    claim: Claim
    how: str
    counts: bool


@dataclass(frozen=True, slots=True)
class Drained:
    """At the end, after a long calm with workers at work: what each group still wants."""

    group: str
    waiting: tuple[CheckpointRecord, ...]


@dataclass(frozen=True, slots=True)
class Agreed:
    """A rank was told that every rank has restored this checkpoint (None: there is none), in that ``round``."""

    run: int
    round: str
    rank: int
    record: CheckpointRecord | None


@dataclass(frozen=True, slots=True)
class Matched:
    """A rank reported how its objects match a checkpoint, in a ``round`` of all ranks."""

    run: int
    round: str
    rank: int
    attempt: str


@dataclass(frozen=True, slots=True)
class Filled:
    """A rank of ``world_size`` began to fill its objects from a checkpoint, in a ``round`` of all ranks."""

    run: int
    round: str
    rank: int
    attempt: str
    world_size: int


@dataclass(frozen=True, slots=True)
class ReadWhole:
    """A rank reported that it has read all of a checkpoint and found it good, in a ``round`` of all ranks."""

    run: int
    round: str
    rank: int
    attempt: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A rank of ``world_size`` began to hand its objects what it had read, in a ``round`` of all ranks."""

    run: int
    round: str
    rank: int
    attempt: str
    world_size: int


@dataclass(frozen=True, slots=True)
class CameBack:
    """After all that, with nothing repaired by hand: what the next job restored and could save. ``lost`` says why not."""

    restored: CheckpointRecord | None
    saved: tuple[CheckpointRecord, ...]
    lost: str = ""


Happening = (
    Logged
    | LostPage
    | Wrote
    | Erased
    | Promised
    | Held
    | LetGo
    | Returned
    | GroupLogged
    | GroupsRead
    | Settled
    | Drained
    | Agreed
    | Matched
    | Filled
    | ReadWhole
    | Finished
    | CameBack
)


@dataclass(slots=True)
class History:
    """Everything that happened under ``seed``, in order."""

    seed: int
    happenings: list[Happening] = field(default_factory=list)

    def add(self, happening: Happening) -> None:
        """It happened just now."""
        self.happenings.append(happening)
