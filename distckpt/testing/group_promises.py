"""Whether the promises to groups held throughout a simulation: each acknowledged once (G10), and none lost (G11).

A group's newest entry is, as for the log, the one with the highest number ever written. What an entry that is not based on
the newest does, does not count, and nobody may have been told that it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from distckpt.directory.sharing import waiting
from distckpt.format.json.group import Claim, GroupEntry, GroupState
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.testing.history import Drained, GroupLogged, GroupsRead, Held, History, LetGo, Logged, Settled

SETTLING = ("ack", "release", "reject")


@dataclass(slots=True)
class _Chain:
    """A group's chain as far as it has been followed. ``settled``: by token, what became of claims that count."""

    newest: GroupEntry | None = None
    settled: dict[str, str] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    deliveries: Counter[str] = field(default_factory=Counter)

    @property
    def state(self) -> GroupState | None:
        return self.newest.state if self.newest is not None else None

    @property
    def claims(self) -> tuple[Claim, ...]:
        return self.newest.state.claims if self.newest is not None else ()


def g10_acknowledged_once(history: History) -> list[str]:
    """In a group a checkpoint is acknowledged once; whoever is told whether his acknowledgement counts is told the truth;

    nobody takes over from a worker whose lease is alive.
    """
    broken: list[str] = []
    chains: dict[str, _Chain] = {}
    holding: dict[str, str] = {}
    told: Counter[tuple[str, str]] = Counter()
    for happening in history.happenings:
        if isinstance(happening, Held):
            holding[happening.reader] = happening.attempt
        elif isinstance(happening, LetGo):
            holding.pop(happening.reader, None)
        elif isinstance(happening, GroupLogged):
            chain = chains.setdefault(happening.group, _Chain())
            if happening.overwrote:
                broken.append(f"{happening.who} wrote over entry {happening.entry.seq} of {happening.group}")
            if happening.entry.seq > (chain.newest.seq if chain.newest is not None else 0):
                broken += [f"{happening.group}: {each}" for each in _follow(chain, happening.entry, holding)]
        elif isinstance(happening, Settled):
            chain = chains[happening.group]
            really = chain.settled.get(happening.claim.token)
            who = f"{happening.group}: {happening.worker}"
            if happening.counts and really != happening.how:
                broken.append(f"{who} was told that its {happening.how} of {happening.claim.attempt} counts: {really}")
            if not happening.counts and really == happening.how:
                broken.append(f"{who} was told that its {happening.how} of {happening.claim.attempt} does not count")
            if happening.counts and happening.how == "ack":
                told[happening.group, happening.claim.attempt] += 1
    return broken + [f"{group} acknowledged {one} {times} times" for (group, one), times in told.items() if times > 1]


def _follow(chain: _Chain, entry: GroupEntry, holding: dict[str, str]) -> list[str]:
    """What is wrong with an entry that becomes the newest."""
    before, broken = chain.newest, []
    if entry.seq != (before.seq if before is not None else 0) + 1:
        broken.append(f"entry {entry.seq} does not follow {before.seq if before is not None else 0}")
    if entry.previous != (before.commit_id if before is not None else ""):
        broken.append(f"entry {entry.seq} was not made from the one before")
    left = {claim.token for claim in entry.state.claims}
    gone = [claim for claim in chain.claims if claim.token not in left]
    if entry.kind in SETTLING:
        chain.settled.update({claim.token: entry.kind for claim in gone})
    if entry.kind == "release":  # takes its delivery back, all but the first
        chain.deliveries.subtract(claim.attempt for claim in gone if claim.delivery > 1)
    if entry.kind == "ack":
        broken += [f"{claim.attempt} was acknowledged before" for claim in gone if claim.attempt in chain.acknowledged]
        chain.acknowledged |= {claim.attempt for claim in gone}
    known = {claim.token for claim in chain.claims}
    for claim in entry.state.claims:
        if claim.token in known:
            continue
        if claim.attempt in chain.acknowledged:
            broken.append(f"{claim.worker} got {claim.attempt}, which was acknowledged before")
        if claim.delivery != chain.deliveries[claim.attempt] + 1:
            broken.append(f"{claim.worker} got {claim.attempt} for the {claim.delivery}. time, which it was not")
        chain.deliveries[claim.attempt] = claim.delivery
        broken += [
            f"{claim.worker} took {claim.attempt} from {other.worker}, whose lease is alive"
            for other in gone
            if other.attempt == claim.attempt and holding.get(other.worker) == other.attempt
        ]
    chain.newest = entry
    return broken


def g11_none_is_lost(history: History) -> list[str]:
    """Who wants each gets each: nothing that a group of mode "all" waits for retires, and it forgets nothing that is there.

    What it waits for no longer it has acknowledged, set aside, or was told that it does not get it; and it says how many
    those are. In the end, when workers have had time, none waits.

    That holds from when whoever retires has read that there is such a group. One that was made since then, or whose first
    entry the reading just missed, may find a checkpoint gone that was there when it was made: it counts that as ``missed``. A
    number that is saved again takes the older checkpoint's place, whoever waits for that.
    """
    broken: list[str] = []
    chains: dict[str, GroupEntry] = {}
    aware: dict[str, set[str]] = {}
    log: Entry | None = None
    for happening in history.happenings:
        if isinstance(happening, GroupsRead):
            aware.setdefault(happening.who, set()).update(happening.groups)
        elif isinstance(happening, GroupLogged):
            before = chains.get(happening.group)
            if happening.entry.seq > (before.seq if before is not None else 0):
                if before is not None and log is not None:
                    state = log.state
                    broken += [f"{happening.group}: {each}" for each in _forgotten(before, happening.entry, state)]
                chains[happening.group] = happening.entry
        elif isinstance(happening, Logged) and happening.entry.seq > (log.seq if log is not None else 0):
            if log is not None:
                known = {group: chains[group].state for group in aware.get(happening.who, ()) if group in chains}
                broken += _taken_away(happening.who, known, log.state, happening.entry.state)
            log = happening.entry
        elif isinstance(happening, Drained) and happening.waiting:
            left = [record.attempt for record in happening.waiting]
            broken.append(f"{happening.group} never gets {left}")
    return broken


def _taken_away(who: str, groups: Mapping[str, GroupState], before: State, after: State) -> list[str]:
    gone = _retired(before, after)
    return [
        f"{who} retired {record.attempt}, which {group} waits for"
        for group, state in groups.items()
        if gone and state.mode == "all"
        for record in waiting(state, before)
        if record in gone
    ]


def _retired(before: State, after: State) -> list[CheckpointRecord]:
    """What may not be opened any more, but for numbers that were saved again."""
    alive = after.alive()
    again = {(record.name, record.number) for record in alive.values()}
    return [one for one in before.alive().values() if one.attempt not in alive and (one.name, one.number) not in again]


def _forgotten(before: GroupEntry, after: GroupEntry, log: State) -> list[str]:
    """What a group of mode "all" waits for no longer, though it is there and nothing is said about it."""
    if before.state.mode != "all":
        return []
    now = {record.attempt for record in waiting(after.state, log)}
    gone = {record.attempt for record in waiting(before.state, log)} - now
    if after.kind == "ack":
        said = after.state.acknowledged - before.state.acknowledged
    elif after.kind == "skip":
        said = after.state.skipped - before.state.skipped
    else:
        said = len({item.attempt for item in after.state.set_aside} - {item.attempt for item in before.state.set_aside})
    if len(gone) > said:
        return [f"entry {after.seq} ({after.kind}) forgets {sorted(gone)}, and speaks of {said}"]
    return []
