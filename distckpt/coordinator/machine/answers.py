"""What ranks are told of a save: where it stands, for whom it waits, and who was last."""

from __future__ import annotations

from distckpt.coordinator.machine.actions import Plan
from distckpt.coordinator.machine.rounds import Phase, SaveRound
from distckpt.coordinator.machine.runs import Run
from distckpt.coordinator.messages import Joined, Landing, Late, Planned, Prepared, Reply, StatusReply
from distckpt.format.json.log import Entry, State
from distckpt.format.names import checkpoint_folder

LATE_SHARE = 0.2
"""After which part of the time that a rank may take the others hear that it is late."""

NAMED_RANKS = 8
"""How many of the ranks that wait for others, or are awaited, are named."""


def joined(round: SaveRound, rank: int) -> Reply:
    """To a rank that takes part."""
    if round.outcome is None or isinstance(round.outcome, Prepared):
        return Joined(round.attempt, rank in round.undescribed)
    return round.outcome


def planned(plan: Plan, rank: int) -> Planned:
    """Which rows the rank writes."""
    return Planned(plan.plan_id, plan.rows(rank))


def awaited(round: SaveRound) -> str:
    """For what it waits."""
    return "to join the save" if round.phase is Phase.JOINING else "to report that its shards have landed"


def remind_at(round: SaveRound, timeout: float) -> float | None:
    """When to look whether one of those who wait is to be told for whom, in monotonic seconds; None: not any more.

    Nothing comes to pass before the deadline moves, so there is one look for each.
    """
    if round.deadline in (None, round.reminded_for) or not (round.awaiting_plan or round.awaiting_end):
        return None
    return (round.deadline or 0.0) - (1 - LATE_SHARE) * timeout


def remind(round: SaveRound, run: Run, mono: float) -> tuple[int, Late] | None:
    """For whom it waits, if one is among them that has not been named, and the ticket of the lowest rank that waits."""
    missing = round.missing()
    round.reminded_for = round.deadline
    if round.reminded.issuperset(missing):
        return None
    round.reminded.update(missing)
    waiting = {rank: ticket for shelf in (round.awaiting_plan, round.awaiting_end) for ticket, rank in shelf.items()}
    seconds = run.save_timeout - ((round.deadline or mono) - mono)
    named = missing[:NAMED_RANKS]
    return waiting[min(waiting)], Late(tuple(named), run.hosts_of(named), seconds, run.save_timeout, awaited(round))


def status(entry: Entry | None, waiting: dict[str, tuple[int, ...]]) -> StatusReply:
    """How the directory stands by its newest entry, and which ranks are awaited."""
    state = entry.state if entry is not None else State()
    return StatusReply(
        epoch=entry.epoch if entry is not None else 0,
        seq=entry.seq if entry is not None else 0,
        run=state.run,
        checkpoints=state.active,
        preserved=state.preserved,
        retiring=state.retiring,
        waiting=waiting,
    )


def landing(round: SaveRound, run: Run) -> Landing | None:
    """Which rank was last; None if nothing is known of it."""
    if round.last_landed is None:
        return None
    rank, at = round.last_landed
    return Landing(rank, run.hosts.get(rank, ""), at - round.first_landed)


def newly_retired(state: State, told: set[str]) -> tuple[str, ...]:
    """Folders of the checkpoints that have retired and of which nobody has been ``told``, which is kept up.

    A save that failed after it had landed retires too, but nobody has known it.
    """
    retiring = {record.attempt: record for record in state.retiring if record.manifest_size}
    new = [record for attempt, record in retiring.items() if attempt not in told]
    told.clear()
    told.update(retiring)
    return tuple(checkpoint_folder(record.name, record.number) for record in new)
