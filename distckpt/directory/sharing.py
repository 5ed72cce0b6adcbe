"""How a group of readers shares checkpoints: what it wants, who gets what, and what comes of that. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from distckpt.format.json.group import (
    MAX_CLAIMS,
    MAX_RANGES,
    MAX_RETURNED,
    MAX_SECONDS,
    MAX_SET_ASIDE,
    MAX_TEXT,
    Claim,
    GroupState,
    Item,
    Mode,
    OnLag,
    Returned,
    SetAside,
    Start,
)
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.page import PageRef
from distckpt.format.names import attempt_age

MAX_DELIVERIES = 20
"""How many deliveries of a checkpoint nobody settles: then it kills its workers, and is set aside."""

LONGEST_BACKOFF = 300.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a group is to work; None: as it does, or as a new one does by default.

    ``mode``: each checkpoint, or the newest only. ``start``: a new group begins with the oldest that there is, or with the
    newest. ``max_backlog``: so many waiting checkpoints are kept for it; ``on_lag``: what becomes of those beyond.
    ``max_attempts``: so many rejections, and a checkpoint is set aside.
    """

    mode: Mode | None = None
    start: Start | None = None
    max_backlog: int | None = None
    on_lag: OnLag | None = None
    max_attempts: int | None = None


DEFAULTS = Settings("latest", "earliest", 16, "skip", 3)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker may claim. ``instead_of`` is the token of a dead claim on it ('' if there is none).

    ``is_stale``: the group wants the newest alone, and has had a newer one.
    """

    item: Item
    delivery: int = 1
    failures: int = 0
    instead_of: str = ""
    is_stale: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nobody is to get it any more: it is stale, or too many deliveries of it were not settled."""
        return self.is_stale or self.delivery - 1 - self.failures >= MAX_DELIVERIES


def made(settings: Settings, log: State) -> GroupState:
    """A new group of a run that stands as ``log`` says."""
    chosen = {
        name: wanted if wanted is not None else getattr(DEFAULTS, name)
        for name, wanted in dataclasses.asdict(settings).items()
    }
    return _placed(GroupState(**chosen), log)


def disagreements(settings: Settings, state: GroupState) -> dict[str, tuple[object, object]]:
    """The settings that are other than the group's, by name: as they are, and as they were wanted."""
    wanted = dataclasses.asdict(settings)
    return {
        name: (getattr(state, name), value)
        for name, value in wanted.items()
        if value is not None and value != getattr(state, name)
    }


def moved(state: GroupState, log: State) -> GroupState:
    """The group at its beginning in ``log``, if that is another than the one that it has followed: as if it were new."""
    if state.origin == log.origin:
        return state
    return _placed(replace(state, claims=(), returned=(), set_aside=()), log)


def _placed(state: GroupState, log: State) -> GroupState:
    """At its beginning in this log."""
    records = _in_order(log)
    before = records[:-1] if state.start == "latest" else []
    last = before[-1] if before else None
    through, attempt = (0, "") if last is None else (last.order, "" if last.order else last.attempt)
    if not before and records and records[0].order:
        through = records[0].order - 1  # so that nobody takes for missed what had gone before
    elif not records:
        through = log.commits
    return replace(state, origin=log.origin, through=through, through_attempt=attempt, finished=())


def unseen(state: GroupState, log: State) -> list[CheckpointRecord]:
    """Those that nobody of the group has had, in the order in which they were committed."""
    known = {item.attempt for item in state.items()}
    return [record for record in _in_order(log) if record.attempt not in known and _is_beyond(state, record)]


def may_want(state: GroupState, log: State, page: PageRef) -> bool:
    """Whether a page may have something that the group has not seen yet, or has had given back, or has at work."""
    if state.origin != log.origin:
        return True
    if state.mode == "all" and (page.orders[1] > state.through or not page.orders[0]):
        return True
    return any(page.may_have_attempt(item.attempt) for item in state.items())


def waiting(state: GroupState, log: State) -> tuple[CheckpointRecord, ...]:
    """What the group still wants of those that may be opened, in the order in which they were committed.

    That are those that it has not seen (of them the newest, if it wants no other), those that were given back, and those
    that its workers have now.
    """
    if state.origin != log.origin:
        state = moved(state, log)
    coming = unseen(state, log)
    wanted = {record.attempt for record in (coming[-1:] if state.mode == "latest" else coming)}
    wanted |= {item.attempt for item in (*state.claims, *state.returned)}
    return tuple(record for record in _in_order(log) if record.attempt in wanted)


def offer(state: GroupState, log: State, dead: Collection[str], resting: Collection[str]) -> Offer | None:
    """What a worker is to claim next; None if there is nothing.

    ``dead`` are tokens of claims that nobody holds any more, ``resting`` attempts whose back-off is not over. Of all of
    them it is the oldest if the group wants each, and the newest if it wants the newest.
    """
    alive = log.alive()
    found = [
        Offer(_item(item), item.deliveries + 1, item.failures)
        for item in state.returned
        if item.attempt in alive and item.attempt not in resting
    ]
    found += [
        Offer(_item(claim), claim.delivery + 1, claim.failures, claim.token, _is_stale(state, claim))
        for claim in state.claims
        if claim.attempt in alive and claim.token in dead
    ]
    coming = unseen(state, log)
    if len(state.claims) < MAX_CLAIMS and len(state.returned) < MAX_RETURNED:
        found += [Offer(item_of(record)) for record in (coming[-1:] if state.mode == "latest" else coming[:1])]
    if not found:
        return None
    return (max if state.mode == "latest" else min)(found, key=lambda each: _place(each.item))


def claimed(
    state: GroupState, log: State, offered: Offer, dead: Collection[str], make: Callable[[Offer], Claim]
) -> GroupState:
    """The group after a worker has got what was offered, under the claim that ``make`` makes."""
    state = _taken(_tidied(state, log, dead), offered)
    state = _passed(state, offered.item)
    if state.mode == "latest":  # what is older than that nobody wants any more
        stale = {
            item.attempt
            for item in (*state.returned, *(claim for claim in state.claims if claim.token in dead))
            if _place(item) < _place(offered.item)
        }
        state = _without(state, stale)
    return replace(state, claims=(*state.claims, make(offered)))


def ended(state: GroupState, log: State, offered: Offer, dead: Collection[str], time: float) -> GroupState:
    """The group after what is over has been passed over if it is stale, and else set aside."""
    state = _taken(_tidied(state, log, dead), offered)
    if offered.is_stale:
        return state
    times = offered.delivery - 1
    unsettled = times - offered.failures
    why = f"{unsettled} times neither acknowledged nor rejected: it seems to end its workers"
    error = f"delivered {times} times, and {why}"
    return _aside(state, SetAside(*_fields(offered.item), times, offered.failures, error, time))


def claim_of(state: GroupState, token: str) -> Claim | None:
    """The claim with that token, if it is still there: nobody has taken over, and it was not settled."""
    return next((claim for claim in state.claims if claim.token == token), None)


def acknowledged(state: GroupState, token: str) -> GroupState | None:
    """The group after a worker is done; None if the claim is not there any more, so that this does not count."""
    claim = claim_of(state, token)
    if claim is None:
        return None
    count = state.acknowledged + 1
    return replace(_without(state, {claim.attempt}), acknowledged=count, last_acknowledged=_item(claim))


def released(state: GroupState, token: str, backoff: float) -> GroupState | None:
    """The group after a worker has given it back, without blame; None as for ``acknowledged``."""
    claim = claim_of(state, token)
    if claim is None:
        return None
    # This delivery ended no worker and failed on none, so it is taken back: but at least one is stored.
    deliveries = max(1, claim.delivery - 1)
    back = Returned(*_fields(claim), deliveries, claim.failures, _longer(backoff, claim.delivery))
    return _given_back(_without(state, {claim.attempt}), back)


def rejected(state: GroupState, token: str, error: str, backoff: float, time: float) -> GroupState | None:
    """The group after a worker has failed on it; None as for ``acknowledged``."""
    claim = claim_of(state, token)
    if claim is None:
        return None
    state, failures, error = _without(state, {claim.attempt}), claim.failures + 1, text(error)
    if failures >= state.max_attempts:
        return _aside(state, SetAside(*_fields(claim), claim.delivery, failures, error, time))
    back = Returned(*_fields(claim), claim.delivery, failures, _longer(backoff, failures), error)
    return _given_back(state, back)


def skipped(state: GroupState, records: Iterable[CheckpointRecord]) -> GroupState:
    """The group after retention has taken these from it, because it lags. What its workers have they keep."""
    held = {item.attempt for item in (*state.claims, *state.set_aside)}
    back = {item.attempt for item in state.returned}
    gone = sorted(
        (each for each in records if each.attempt not in held and (each.attempt in back or _is_beyond(state, each))),
        key=_place,
    )
    if not gone:
        return state
    state = _without(state, {record.attempt for record in gone})
    for record in gone:
        if not _is_beyond(state, record):
            continue
        if record.order:
            state = _joined(replace(state, finished=(*state.finished, (record.order, record.order))))
        else:  # of those that were not counted there is a place only, and they come and go from the oldest on
            state = replace(state, through_attempt=record.attempt)
    return replace(state, skipped=state.skipped + len(gone), last_skipped=item_of(gone[-1]))


def retried(state: GroupState, attempts: Collection[str]) -> GroupState:
    """The group after somebody has put back what was set aside: it begins anew, as after one delivery."""
    back = tuple(
        Returned(*_fields(item), 1, 0, 0.0, item.error) for item in state.set_aside if item.attempt in attempts
    )
    state = _without(state, {item.attempt for item in back})
    return replace(state, returned=(*state.returned, *back))


def is_done(state: GroupState, log: State) -> bool:
    """Whether there is nothing left that a worker has, could have, or could have to take over."""
    return not waiting(state, log)


def item_of(record: CheckpointRecord) -> Item:
    """A checkpoint of the log as a group knows it."""
    return Item(record.order, record.name, record.number, record.attempt)


def text(error: str) -> str:
    """What of it has room, the end first, and can be stored."""
    return error.encode("utf-8", "replace").decode()[-MAX_TEXT:]


def _in_order(log: State) -> list[CheckpointRecord]:
    return sorted(log.alive().values(), key=_place)


def _place(item: Item | CheckpointRecord) -> tuple[int, tuple[int, str]]:
    return item.order, attempt_age(item.attempt)


def _position(state: GroupState) -> tuple[int, tuple[int, str]]:
    """Where the group is, to be compared with places: after all that is done with without a gap, or was given out."""
    return state.through, attempt_age(state.through_attempt) if state.through_attempt else (0, "")


def _is_beyond(state: GroupState, record: CheckpointRecord) -> bool:
    if record.order:
        inside = any(first <= record.order <= last for first, last in state.finished)
        return record.order > state.through and not inside
    return _place(record) > _position(state)


def _tidied(state: GroupState, log: State, dead: Collection[str]) -> GroupState:
    """Without what was to be delivered again, and cannot be, since it was deleted.

    Not what was committed after the log was read: others may have had that meanwhile, and have given it back.
    """
    alive = log.alive()
    again = (*state.returned, *(claim for claim in state.claims if claim.token in dead))
    gone = {
        item.attempt
        for item in again
        if item.attempt not in alive and item.order <= log.commits and not log.may_have_in_pages(item.attempt)
    }
    return replace(_without(state, gone), missed=state.missed + len(gone))


def _taken(state: GroupState, offered: Offer) -> GroupState:
    """Without it in the lists."""
    return _without(state, {offered.item.attempt})


def _passed(state: GroupState, item: Item) -> GroupState:
    """At ``item``, if that is beyond; who wants each has missed what lay before, and is neither finished nor there."""
    if item.order == state.through > 0 or _place(item) <= _position(state):
        return state
    if not item.order:
        return replace(state, through_attempt=item.attempt)
    between = item.order - state.through - 1
    between -= sum(last - first + 1 for first, last in state.finished if last < item.order)
    missed = state.missed + (between if state.mode == "all" else 0)
    finished = tuple(each for each in state.finished if each[0] > item.order)
    return _joined(replace(state, through=item.order, through_attempt="", finished=finished, missed=missed))


def _joined(state: GroupState) -> GroupState:
    """With ranges that touch made one, and those that begin at ``through`` a part of that."""
    through, ranges = state.through, list[tuple[int, int]]()
    for first, last in sorted(state.finished):
        if first <= through + 1 and through:
            through = max(through, last)
        elif ranges and first <= ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], last)
        else:
            ranges.append((first, last))
    # More ranges than that would need as many checkpoints that retention keeps in between. The oldest are long gone.
    attempt = state.through_attempt if not through else ""
    return replace(state, through=through, through_attempt=attempt, finished=tuple(ranges[-MAX_RANGES:]))


def _without(state: GroupState, attempts: Collection[str]) -> GroupState:
    if not attempts:
        return state
    return replace(
        state,
        claims=tuple(claim for claim in state.claims if claim.attempt not in attempts),
        returned=tuple(item for item in state.returned if item.attempt not in attempts),
        set_aside=tuple(item for item in state.set_aside if item.attempt not in attempts),
    )


def _given_back(state: GroupState, item: Returned) -> GroupState:
    """With it to be delivered again, if anybody would want it."""
    return state if _is_stale(state, item) else replace(state, returned=(*state.returned, item))


def _is_stale(state: GroupState, item: Item) -> bool:
    """Whether the group wants the newest alone, and a newer one than this has been given out."""
    return state.mode == "latest" and _place(item) < _position(state)


def _aside(state: GroupState, item: SetAside) -> GroupState:
    aside = (*state.set_aside, item)
    over = max(0, len(aside) - MAX_SET_ASIDE)
    return replace(state, set_aside=aside[over:], forgotten=state.forgotten + over)


def _longer(backoff: float, times: int) -> float:
    """Twice as long each time, up to five minutes, or to as long as it is from the beginning."""
    return min(backoff * 2.0 ** min(times - 1, 30), max(backoff, LONGEST_BACKOFF), MAX_SECONDS)


def _item(item: Item) -> Item:
    return Item(*_fields(item))


def _fields(item: Item) -> tuple[int, str, int, str]:
    return item.order, item.name, item.number, item.attempt
