"""What ranks say to the coordinator, and what it answers. Every request may arrive late, twice or out of order.

A rank's life: OpenRun once, and after that everything in an envelope, FromRank. For each save Join, Describe if asked,
AwaitPlan if it has no valid plan, MakeRoom if the store is full, Receipt once its shards have landed (or Fail); for each
restore Restore until it is done: first all ranks match, then all fill, then all finish. The answers to AwaitPlan,
Receipt and Restore come when there is something to say; a rank that hears nothing simply asks again. Beside all that, a
rank with a ``distckpt.Coordinator`` of the whole cluster sends AwaitStop again and again, to hear of stops of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distckpt.errors import DistckptError
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Retention
from distckpt.threads.report import StopReport


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A process of the incarnation ``token`` reports. The first one to come starts a new run; the rest join it.

    ``run`` is 0 at first; a process that opens its run again, because the coordinator was replaced, gives the number
    it had, and the ``origin`` of the log. So a coordinator never takes a directory over on behalf of a run that has been
    superseded, nor one that is not the run's, because the run's was deleted, say.
    """

    token: str
    rank: int
    world_size: int
    host: str
    name: str
    retention: Retention
    save_timeout: float
    run: int = 0
    origin: str = ""


@dataclass(frozen=True, slots=True)
class RunOpened:
    """The run's number, larger than that of every run before it, and the log's origin. ``recovers_at`` is when its manager
    was made, in epoch seconds, until the log says what it manages: from its first commit on."""

    run: int
    epoch: int
    recovers_at: float | None
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """The rank takes part in saving ``number`` (None: it only prepares).

    ``order`` counts the rank's saves, by which a repeat is recognized; ``earlier`` are its saves before this one that are
    not over, each with its number, and ``age`` is how many seconds ago this one began. A rank joins in that order.
    ``digest`` names its description. ``staged`` says that it has already copied what plan ``plan`` assigned to it.
    ``attempt`` is the attempt it was part of before the coordinator was replaced, else ''.
    ``skip_if_busy`` asks for Skipped if so many saves are in flight (0: never); the first rank's answer is everyone's.
    """

    order: int
    number: int | None
    digest: str
    plan: str = ""
    staged: bool = False
    attempt: str = ""
    skip_if_busy: int = 0
    earlier: tuple[tuple[int, int | None], ...] = ()
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class Joined:
    """The attempt to write for. ``describe`` asks for the description, which the coordinator does not have."""

    attempt: str
    describe: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    """A save is in flight, and all ranks skip this one."""


@dataclass(frozen=True, slots=True)
class Describe:
    """What a rank holds (an Arrow table) and, if it has staged already, which rows of it (int32, little endian)."""

    attempt: str
    digest: str
    description: bytes = field(repr=False)
    staged: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Heard."""


@dataclass(frozen=True, slots=True)
class AwaitPlan:
    """The rank needs to know which of its chunks it writes."""

    attempt: str


@dataclass(frozen=True, slots=True)
class Planned:
    """Rows of the rank's description that it writes (int32, little endian), in order; ``plan`` names the plan."""

    plan: str
    rows: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Receipt:
    """All shards of the rank have landed, their rows those assigned to it, in order. The first rank's metrics count."""

    attempt: str
    shards: tuple[ShardReceipt, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Late:
    """A save waits for ``ranks`` on ``hosts``, for ``seconds`` of ``timeout`` by now: ask again.

    It is told once, long before the deadline, to one of the ranks that wait.
    """

    ranks: tuple[int, ...]
    hosts: Mapping[int, str]
    seconds: float
    timeout: float
    stage: str


@dataclass(frozen=True, slots=True)
class Lag:
    """A save waits, without a deadline, until fewer than ``most`` checkpoints wait for ``group``: ask again."""

    group: str
    waiting: int
    most: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Landing:
    """The shards of ``rank`` on ``host`` were the last to land, so many ``seconds`` after those of the first rank."""

    rank: int
    host: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Committed:
    """The checkpoint is in the log, durable and visible. ``retired`` are folders of those that no longer are.

    The one that was ``last``, and what retired, are told once, when it happens.
    """

    record: CheckpointRecord
    last: Landing | None = None
    retired: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Every rank of a prepare has its plan."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The rank cannot do its part; the save fails for all. ``reason`` is its error's text."""

    attempt: str
    reason: str


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """The store is full: what attempts have left that came to nothing is to be deleted at once. Answered when it has been.

    To ask twice does no harm.
    """


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """How a rank's objects, or those of all ranks together, match one checkpoint.

    ``unclaimed`` has one bit for each key of the checkpoint, in the order of its index and packed as NumPy does: set if
    no object has a place for it. ``matched`` is how many keys one rank has a place for, at most. ``missing`` are keys
    of objects that the checkpoint lacks, and ``misfits`` pairs keys with why they do not fit: the first of them, while
    the counts are of all on one rank at least.
    """

    unclaimed: bytes = field(repr=False)
    matched: int
    missing: tuple[str, ...] = ()
    misfits: tuple[tuple[str, str], ...] = ()
    missing_count: int = 0
    misfit_count: int = 0

    @property
    def fits(self) -> bool:
        """Whether every key on either side has its other half."""
        return not self.missing and not self.misfits and not any(self.unclaimed)

    @property
    def in_vain(self) -> bool:
        """Whether objects and checkpoint have nothing in common, though there is something on one side."""
        return not self.matched and not self.fits


LISTED_KEYS = 64


def merged_matches(one: KeyMatch, other: KeyMatch) -> KeyMatch:
    """Both together: a key is unclaimed if neither claims it, and missing or misfitting if it is for either."""
    unclaimed = int.from_bytes(one.unclaimed, "big") & int.from_bytes(other.unclaimed, "big")
    missing = tuple(dict.fromkeys((*one.missing, *other.missing)))
    misfits = tuple({**dict(other.misfits), **dict(one.misfits)}.items())
    return KeyMatch(
        unclaimed.to_bytes(max(len(one.unclaimed), len(other.unclaimed)), "big"),
        max(one.matched, other.matched),
        missing[:LISTED_KEYS],
        misfits[:LISTED_KEYS],
        max(one.missing_count, other.missing_count, len(missing)),
        max(one.misfit_count, other.misfit_count, len(misfits)),
    )


RestoreStage = Literal["match", "fill", "finish"]


@dataclass(frozen=True, slots=True)
class Restore:
    """The rank wants to restore together with all others.

    ``order`` counts the rank's restores, by which a repeat is recognized. Ranks wait for each other in a restore, so one
    that begins takes part in the one that waits for it: the counters need not agree.

    ``which`` is a number, a folder like ``ckpt-42``, or None for the newest; all ranks must ask for the same, and be
    ``partial`` alike, which allows that keys do not match. ``tried`` is the attempt that the last answer named ('' at
    first), ``round`` the round, in which alone the report counts, and ``stage`` what it wanted done: ``refused`` is why
    this rank could not ('' if it could), ``keys`` how objects and checkpoint match, in the first stage. ``failed`` is an
    error of the rank that no other checkpoint would help against: all ranks give up.
    """

    order: int
    which: int | str | None
    tried: str = ""
    refused: str = ""
    failed: str = ""
    stage: RestoreStage = "match"
    keys: KeyMatch | None = None
    partial: bool = False
    round: str = ""


@dataclass(frozen=True, slots=True)
class MatchWith:
    """Find out how this one and the objects match, change nothing, and report.

    ``refused`` pairs the paths given up so far with the reasons. ``round`` names the round, as in the answers below.
    """

    record: CheckpointRecord
    refused: tuple[tuple[str, str], ...] = ()
    round: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class FillFrom:
    """Every rank has matched this one: read all of it, tensors into the memory that they have, and report."""

    record: CheckpointRecord
    round: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class FinishWith:
    """Every rank has read all of this one, and every byte was good: hand the objects what is not in its place, and report.

    From here on nothing falls back. ``keys`` is how all ranks match.
    """

    record: CheckpointRecord
    keys: KeyMatch
    round: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Mismatched:
    """The restore is over, and nothing has been changed on any rank: ``keys`` is how ``record`` and all ranks match."""

    record: CheckpointRecord
    keys: KeyMatch


@dataclass(frozen=True, slots=True)
class Restored:
    """Every rank restored ``record``; None: there is no checkpoint, so every rank initializes."""

    record: CheckpointRecord | None
    refused: tuple[tuple[str, str], ...] = ()
    round: str = field(default="", compare=False)


Members = Mapping[int, str | None]
"""Ranks that take part in stops, with their hosts; None for those that have left."""


def merged_members(one: Members, other: Members) -> Members:
    """Who takes part by both accounts. Who has left by either has left."""
    if one == other:
        return one
    return {**one, **other, **{rank: None for rank, host in one.items() if host is None}}


@dataclass(frozen=True, slots=True)
class AwaitStop:
    """The rank takes part in ``generation``, and wants to know of its stop when that is another than ``known``.

    ``known`` is the stop that it knows of or asks for itself: the first one to come is everyone's. ``members`` are the
    ranks that it knows to take part. It is answered within ``patience`` seconds, in any case. Nothing heard of it for
    ``silence_timeout`` seconds is a stop by itself; None says that the rank leaves.
    """

    generation: int
    known: StopReport | None
    members: Members
    silence_timeout: float | None
    patience: float


@dataclass(frozen=True, slots=True)
class StopState:
    """The stop of the generation, None while there is none, and who takes part as in AwaitStop."""

    stop: StopReport | None
    members: Members


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep (or stop keeping) a checkpoint from retention, whoever asks."""

    number: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The rank lives; its run stays current and the coordinator does not go idle."""


@dataclass(frozen=True, slots=True)
class AwaitPublished:
    """The rank wants to hear when the ``checkpoint`` file says what has been committed so far, or could not."""


@dataclass(frozen=True, slots=True)
class Leave:
    """The rank is done with the run.

    ``final`` says that training is over. That is answered once all ranks have said so and the log does; a repeat is
    answered alike.
    """

    final: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """Anyone asks what is going on."""


@dataclass(frozen=True, slots=True)
class StatusReply:
    """Epoch and log position, the state's checkpoints, and for each attempt in flight the ranks still awaited."""

    epoch: int
    seq: int
    run: int
    checkpoints: tuple[CheckpointRecord, ...]
    preserved: tuple[CheckpointRecord, ...]
    retiring: tuple[CheckpointRecord, ...]
    waiting: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Refused:
    """The request failed for this rank; ``error`` says why."""

    error: DistckptError


@dataclass(frozen=True, slots=True)
class Unknown:
    """The coordinator does not know that run or attempt (it was replaced): OpenRun and Join again."""


RankRequest = (
    Join | Describe | AwaitPlan | Receipt | Fail | MakeRoom | Restore | AwaitStop | Heartbeat | AwaitPublished | Leave
)


@dataclass(frozen=True, slots=True)
class FromRank:
    """What ``rank`` of ``run`` says. Whoever is not, or no longer, a rank of the current run is told so."""

    run: int
    rank: int
    request: RankRequest


Request = OpenRun | FromRank | Pin | Status
Reply = (
    RunOpened
    | Joined
    | Skipped
    | Accepted
    | Planned
    | Late
    | Lag
    | Committed
    | Prepared
    | MatchWith
    | FillFrom
    | FinishWith
    | Mismatched
    | Restored
    | StopState
    | StatusReply
    | Refused
    | Unknown
)


def kind_of(request: Request) -> str:
    """What somebody wants of the coordinator, in one word for people."""
    return type(request.request if isinstance(request, FromRank) else request).__name__
