"""One save of all ranks: how far it has come, who has joined, which plan they follow, whose shards have landed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from distckpt.coordinator.machine.actions import Plan, Sealed
from distckpt.coordinator.machine.plans import HeldPlan, Plans
from distckpt.coordinator.messages import Describe, Join, Receipt, Reply
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.names import attempt_age

Shelf = dict[int, int]
Place = tuple[int, str, str]


class Phase(IntEnum):
    """How far a round has come. It goes through them in this order, and may be over at any time."""

    JOINING = 1
    """Ranks join and say what they hold."""
    PLANNING = 2
    """All have joined, and the plan is being made."""
    WRITING = 3
    """Every rank may know what it writes; receipts come in."""
    SEALING = 4
    """Every shard has landed: the store is looked at, and index and manifest are written."""
    SEALED = 5
    """All of it is durable; only who reads which checkpoint is not known yet."""
    COMMITTING = 6
    """The log entry is on its way."""
    OVER = 7
    """``outcome`` is what every rank is told."""


@dataclass(slots=True, eq=False)
class SaveRound:
    """One save of all ranks. ``number`` None: it only prepares. Times and deadlines are monotonic.

    ``orders`` has the counter of each rank that has joined; ``formers`` are its attempts from before the coordinator was
    replaced; ``missed`` is the place of one of the same number that ended because the rank that begins this had not come to it;
    ``place`` sorts rounds as they began: what goes on after a restart keeps it, and what is tried again comes next to
    what it missed. ``first_landed`` is when the first rank's shards had landed, ``last_landed`` the last rank and when its had;
    ``reminded`` are ranks of which others know that they are late, as was looked for this deadline, ``reminded_for``.
    ``strays`` are numbers that ranks saved which did not join this. ``time`` is when sealing began, in epoch seconds;
    ``record`` what the log will say of it, once it is sealed. ``ended`` is when it was over, and ``absent`` are ranks
    whose absence ended it. Tickets on ``awaiting_plan`` and ``awaiting_end`` wait for that.
    """

    number: int | None
    attempt: str
    world_size: int
    deadline: float | None
    phase: Phase = Phase.JOINING
    joins: dict[int, Join] = field(default_factory=dict)
    orders: dict[int, int] = field(default_factory=dict)
    formers: set[str] = field(default_factory=set)
    strays: dict[int, int | None] = field(default_factory=dict)
    undescribed: set[int] = field(default_factory=set)
    asked_again: set[int] = field(default_factory=set)
    descriptions: dict[int, bytes] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    staged_plans: dict[int, HeldPlan] = field(default_factory=dict)
    staged_rows: dict[int, bytes] = field(default_factory=dict)
    plan: Plan | None = None
    told: set[int] = field(default_factory=set)
    receipts: dict[int, Receipt] = field(default_factory=dict)
    first_landed: float = 0.0
    last_landed: tuple[int, float] | None = None
    reminded: set[int] = field(default_factory=set)
    reminded_for: float | None = None
    time: float = 0.0
    record: CheckpointRecord | None = None
    outcome: Reply | None = None
    missed: Place | None = None
    place: Place = field(init=False)
    ended: float = 0.0
    absent: frozenset[int] = frozenset()
    awaiting_plan: Shelf = field(default_factory=dict)
    awaiting_end: Shelf = field(default_factory=dict)

    def __post_init__(self) -> None:
        epoch, made = attempt_age(self.attempt)
        if self.missed is not None:
            epoch, made, again = self.missed
            self.place = epoch, made, f"{again}/{self.attempt.rpartition('-')[2]}"
        else:
            self.place = epoch, made, ""

    def goes_on_with(self, former: str) -> None:
        """A rank was part of it before the coordinator was replaced, in that attempt."""
        self.formers.add(former)
        self.place = min((*attempt_age(one), "") for one in self.formers)

    @property
    def saves(self) -> bool:
        """Whether it saves rather than only prepares."""
        return self.number is not None

    @property
    def all_joined(self) -> bool:
        """Whether every rank takes part."""
        return len(self.joins) == self.world_size

    @property
    def can_plan(self) -> bool:
        """Whether everything that a plan needs is known, and no plan is there or being made."""
        return self.phase is Phase.JOINING and self.all_joined and not self.undescribed

    @property
    def can_seal(self) -> bool:
        """Whether every shard of every rank has landed as planned, and sealing has not begun."""
        return self.phase is Phase.WRITING and self.saves and len(self.receipts) == self.world_size

    @property
    def landed(self) -> bool:
        """Whether all shards have landed: nothing that a rank says, and no deadline, gives the round up any more."""
        return self.phase in (Phase.SEALING, Phase.SEALED, Phase.COMMITTING)

    @property
    def over(self) -> bool:
        """Whether its outcome is known."""
        return self.phase is Phase.OVER

    def takes_part(self, rank: int) -> bool:
        """Whether ``rank`` has joined, or had before the round ended."""
        return rank in self.joins or self.over

    def awaits(self, rank: int, began: float) -> bool:
        """Whether its outcome, once it is over, is what a rank is to be told that has not joined it.

        A rank for which it waited in vain has missed it, unless that rank's save ``began`` while it was waited for.
        """
        return rank not in self.absent or began < self.ended

    # ---- from phase to phase ---------------------------------------------------------------------------------------

    def plan_begins(self) -> None:
        """Everything that the plan needs is there. Making it takes as long as it takes."""
        assert self.can_plan
        self.phase = Phase.PLANNING
        self.deadline = None

    def follow(self, plan: Plan, deadline: float) -> None:
        """This is the plan, made for this round or for an earlier one that was alike."""
        assert self.phase in (Phase.JOINING, Phase.PLANNING)
        self.phase = Phase.WRITING
        self.plan = plan
        self.deadline = deadline

    def seal_begins(self, time: float) -> None:
        """All shards have landed. Sealing takes as long as it takes."""
        assert self.can_seal
        self.phase = Phase.SEALING
        self.time = time
        self.deadline = None

    def sealed(self, name: str, event: Sealed, deadline: float) -> None:
        """All of it is durable. By the deadline it is committed, whoever reads what, as a checkpoint of that name."""
        assert self.phase is Phase.SEALING
        assert self.number is not None
        self.phase = Phase.SEALED
        self.record = CheckpointRecord(
            name=name,
            number=self.number,
            attempt=self.attempt,
            manifest_size=event.manifest_size,
            manifest_crc32c=event.manifest_crc32c,
            time=self.time,
            world_size=self.world_size,
            nbytes=event.nbytes,
            metrics=dict(self.receipts[0].metrics),
        )
        self.deadline = deadline

    def commit_begins(self, deadline: float) -> None:
        """The log entry is wanted."""
        assert self.phase is Phase.SEALED
        self.phase = Phase.COMMITTING
        self.deadline = deadline

    def end(self, outcome: Reply, mono: float, absent: frozenset[int]) -> None:
        """Remember the outcome and let go of everything large."""
        self.phase = Phase.OVER
        self.outcome = outcome
        self.ended = mono
        self.absent = absent
        self.deadline = None
        # New containers, not cleared ones: an action that is still being performed may hold the old ones.
        self.joins, self.descriptions, self.staged_plans, self.staged_rows, self.receipts = {}, {}, {}, {}, {}
        self.undescribed, self.asked_again, self.told, self.fresh = set(), set(), set(), set()
        if self.saves:
            self.plan = None

    def land(self, rank: int, message: Receipt, mono: float) -> None:
        """All shards of a rank are on storage."""
        if not self.receipts:
            self.first_landed = mono
        self.receipts[rank] = message
        self.last_landed = rank, mono

    # ---- what ranks say --------------------------------------------------------------------------------------------

    def join(self, rank: int, message: Join, plans: Plans) -> None:
        """Take a rank in, with what is already known of what it holds."""
        self.joins[rank] = message
        description = plans.description(rank, message.digest)
        if description is not None:
            self.descriptions[rank] = description
        held = plans.staged_under(rank, message)
        if held is not None:
            self.staged_plans[rank] = held
        known = held is not None if message.staged else plans.follows_one(rank, message.digest)
        if description is None or not known:
            self.undescribed.add(rank)

    def not_compared(self) -> list[int]:
        """Ranks of whose copies nothing is known as they are now, in a round that no plan of before fits."""
        return [rank for rank, join in self.joins.items() if not join.staged and rank not in self.fresh]

    def describe_again(self, ranks: Iterable[int]) -> None:
        """What these ranks described for an earlier save says nothing about what they hold now."""
        self.undescribed.update(ranks)
        self.asked_again.update(ranks)

    def describe(self, rank: int, message: Describe) -> None:
        """Take what a rank holds, and which rows of it the rank has copied already."""
        self.undescribed.discard(rank)
        self.asked_again.discard(rank)
        self.joins[rank] = dataclasses.replace(self.joins[rank], digest=message.digest)
        self.descriptions[rank] = message.description
        if message.staged is None:
            self.fresh.add(rank)
        else:
            self.staged_rows[rank] = message.staged

    def copied(self, rank: int) -> bytes | None:
        """Which rows a staged rank has copied. None if it has not said so."""
        held = self.staged_plans.get(rank)
        return held.plan.rows(rank) if held is not None else self.staged_rows.get(rank)

    def staged_ranks(self) -> list[int]:
        """The ranks that have copied their part already."""
        return [rank for rank, join in self.joins.items() if join.staged]

    def misplanned(self, plan: Plan) -> int | None:
        """A rank that has copied other rows than the plan wants of it, or None."""
        return next((rank for rank in self.staged_ranks() if self.copied(rank) != plan.rows(rank)), None)

    def misjoined(self, rank: int, message: Join) -> bool:
        """Whether a rank that had joined unstaged says, too late for the plan, that it has copied its part."""
        made = self.plan is not None and self.plan.plan_id == message.plan
        return message.staged and not self.joins[rank].staged and not made

    def missing(self) -> list[int]:
        """The ranks that it waits for, ascending."""
        ranks = range(self.world_size)
        if self.phase is Phase.JOINING:
            return [rank for rank in ranks if rank not in self.joins or rank in self.undescribed]
        if self.phase is Phase.WRITING:
            return [rank for rank in ranks if rank not in self.receipts]
        return []
