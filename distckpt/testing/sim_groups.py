"""Simulated groups: workers that share checkpoints by the real rules of ``directory.sharing``, over simulated chains.

What ``directory.groups`` and ``evaluation.claims`` do on a store is done here again, one request at a time, so that
anybody may die or stand still between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

from msgspec.structs import replace

from distckpt.directory import sharing
from distckpt.directory.sharing import Offer, Settings
from distckpt.directory.stillness import Stillness
from distckpt.errors import StoreOutcomeUnknownError
from distckpt.format.json.group import FORMAT, Claim, GroupEntry, GroupState, Kind
from distckpt.format.json.log import State
from distckpt.testing.history import Settled
from distckpt.testing.sim_ranks import Sleep, Task
from distckpt.testing.sim_readers import LEASE_SECONDS, Holder, Holding, Steps
from distckpt.testing.sim_requests import Creation, Outcome
from distckpt.testing.sim_store import SimulatedChain
from distckpt.testing.sim_world import SimulatedWorld

BACKOFF = 1.0

Waits = Generator[Sleep, None, None]


class Writer(Protocol):
    """Who appends to a group's chain."""

    name: str

    def later(self, step: Callable[[], None], slowness: float = 1.0) -> None:
        """See ``sim_requests.Later``."""


def change(
    world: SimulatedWorld,
    writer: Writer,
    group: str,
    kind: Kind,
    apply: Callable[[GroupState | None], GroupState | None],
) -> Generator[Sleep, None, GroupState | None]:
    """What ``Group.change`` does. StoreOutcomeUnknownError where that raises it."""
    chain, doubt = world.store.group(group), False
    while True:
        found = yield from newest(world, chain)
        before = found.state if found is not None else None
        state = apply(before)
        if state is None and doubt:
            raise StoreOutcomeUnknownError(f"{group}", "it may count, for what came next is gone")
        if state is None or state == before:
            return state
        seq, previous = (found.seq + 1, found.commit_id) if found is not None else (1, "")
        entry = GroupEntry(FORMAT, seq, kind, 0.0, writer.name, _unique(world), previous, state)
        counts = yield from _append(world, writer, chain, entry)
        doubt = doubt or counts is None
        if counts:
            chain.prune(seq - world.random.choice([0, 0, 1, 3]))
            return state


def newest(world: SimulatedWorld, chain: SimulatedChain[GroupEntry]) -> Generator[Sleep, None, GroupEntry | None]:
    """The newest entry of a chain: listing it and reading that are two steps."""
    while True:
        seq = chain.newest()
        yield Sleep(world.latency() * 0.3)
        if seq == 0:
            return None
        if seq in chain.entries:
            return chain.entries[seq]


def _append(
    world: SimulatedWorld, writer: Writer, chain: SimulatedChain[GroupEntry], entry: GroupEntry
) -> Generator[Sleep, None, bool | None]:
    """Whether it counts; None if nobody can tell."""
    outcomes: list[Outcome] = []

    def told(entry: GroupEntry, outcome: Outcome, found: GroupEntry | None) -> None:
        outcomes.append(outcome)

    Creation(world, chain, writer.name, entry, writer.later, told, "no_group_read_back").begin()
    while not outcomes:
        yield Sleep(0.05)
    if outcomes[0] == "unknown":
        raise StoreOutcomeUnknownError(f"entry {entry.seq}", "no answer")
    yield Sleep(world.latency() * 0.3)
    if chain.newest() == entry.seq or "ignore_group_newest" in world.unsafe:
        return outcomes[0] != "taken"
    yield Sleep(world.latency() * 0.3)
    following = chain.entries.get(entry.seq + 1)
    return following.previous == entry.commit_id if following is not None else None


def _unique(world: SimulatedWorld) -> str:
    return f"{world.unique():032x}"


class Member(Holder):
    """A worker of a group: gets a checkpoint, reads it, and settles it. It may die anywhere."""

    def __init__(self, world: SimulatedWorld, name: str, group: str, settings: Settings) -> None:
        super().__init__(world, name)
        self.group = group
        self._settings = settings
        self._pace = world.random.choice([0.01, 0.1, 1.0])
        self._chain = world.store.group(group)
        self._leases = Stillness()
        self._backoffs = Stillness()
        self.start(self._live())

    def _live(self) -> Task:
        while True:
            yield Sleep(self.world.random.uniform(0.1, 1.5))
            try:
                got = yield from self._get()
                if got is not None:
                    yield from self._work(*got)
            except StoreOutcomeUnknownError:
                continue

    # ---- getting ---------------------------------------------------------------------------------------------------

    def _get(self) -> Steps[tuple[State, Holding, Claim] | None]:
        log = yield from self.listed()
        found = yield from newest(self.world, self._chain)
        if found is None:
            made = sharing.made(self._settings, log)
            yield from change(self.world, self, self.group, "make", lambda state: made if state is None else state)
            return None
        log = yield from self.listed()  # after the group: so it knows all that the group does
        dead = yield from self._dead(found.state)
        resting = self._resting(found.state)
        offered = sharing.offer(sharing.moved(found.state, log), log, dead, resting)
        if offered is None:
            return None
        if offered.is_over:
            yield from self._end(log, offered, dead, resting)
            return None
        holding = yield from self.take(offered.item.attempt)
        if holding is None:
            return None
        try:
            claim = yield from self._claim(log, offered, holding, dead, resting)
        except StoreOutcomeUnknownError:
            self.release(holding)
            raise
        if claim is None or self.lost(holding):
            self.release(holding)
            return None
        return log, holding, claim

    def _claim(
        self, log: State, offered: Offer, holding: Holding, dead: frozenset[str], resting: frozenset[str]
    ) -> Steps[Claim | None]:
        made: list[Claim] = []

        def claim(offer: Offer) -> Claim:
            item = offer.item
            fields = item.order, item.name, item.number, item.attempt, offer.delivery, offer.failures
            made.append(Claim(*fields, self.name, holding.id, LEASE_SECONDS, _unique(self.world)))
            return made[-1]

        def apply(state: GroupState) -> GroupState | None:
            state = sharing.moved(state, log)
            now = sharing.offer(state, log, dead, resting)
            return sharing.claimed(state, log, now, dead, claim) if now == offered else None

        state = yield from self._change("claim", apply)
        return made[-1] if state is not None else None

    def _end(self, log: State, offered: Offer, dead: frozenset[str], resting: frozenset[str]) -> Steps[None]:
        def apply(state: GroupState) -> GroupState | None:
            state = sharing.moved(state, log)
            still = sharing.offer(state, log, dead, resting) == offered
            return sharing.ended(state, log, offered, dead, 0.0) if still else None

        yield from self._change("skip" if offered.is_stale else "reject", apply)

    def _change(self, kind: Kind, apply: Callable[[GroupState], GroupState | None]) -> Steps[GroupState | None]:
        return (
            yield from change(
                self.world, self, self.group, kind, lambda state: apply(state) if state is not None else None
            )
        )

    def _dead(self, state: GroupState) -> Steps[frozenset[str]]:
        """Tokens of claims whose leases are gone, or have not changed for long enough since they were first seen so."""
        self._leases.forget_all_but({claim.token for claim in state.claims})
        dead = set()
        for claim in state.claims:
            asked = self.clocks.elapsed()
            yield Sleep(self.world.latency() * 0.3)
            lease = self.world.store.leases.get(claim.lease)
            if lease is None:
                dead.add(claim.token)
                continue
            content, answered = (lease.attempt, lease.beat), self.clocks.elapsed()
            is_dead = self._leases.still_for(claim.token, content, asked=asked, answered=answered) >= claim.seconds
            if "wall_clock_leases" in self.world.unsafe:
                is_dead = lease.expires < self.clocks.wall()
            if is_dead:
                dead.add(claim.token)
        return frozenset(dead)

    def _resting(self, state: GroupState) -> frozenset[str]:
        deliveries = {f"{item.attempt}#{item.deliveries}": item for item in state.returned}
        self._backoffs.forget_all_but(deliveries)
        now = self.clocks.elapsed()
        return frozenset(
            item.attempt
            for key, item in deliveries.items()
            if self._backoffs.still_for(key, "", asked=now, answered=now) < item.backoff
        )

    # ---- working ---------------------------------------------------------------------------------------------------

    def _work(self, log: State, holding: Holding, claim: Claim) -> Steps[None]:
        self.hold(holding)
        try:
            is_read = yield from self.use(holding, log.alive()[claim.attempt], self._pace)
            how = self.world.pick(reject=self.world.faults.rejected, release=self.world.faults.released) or "ack"
            # One that has lost its lease has nothing to show; but what it had read before may be all that it needs.
            if not is_read and self.world.random.random() < 0.5:
                how = "release"
            yield from self._settle(claim, how)
        finally:
            self.release(holding)

    def _settle(self, claim: Claim, how: str) -> Steps[None]:
        def apply(state: GroupState) -> GroupState | None:
            if how == "reject":
                return sharing.rejected(state, claim.token, "failed", BACKOFF, 0.0)
            if how == "release":
                return sharing.released(state, claim.token, BACKOFF)
            counts = sharing.acknowledged(state, claim.token)
            if counts is None and "ack_without_token" in self.world.unsafe:
                return replace(state, acknowledged=state.acknowledged + 1)
            return counts

        kinds: dict[str, Kind] = {"ack": "ack", "release": "release", "reject": "reject"}
        state = yield from self._change(kinds[how], apply)
        self.world.history.add(Settled(self.name, self.group, claim, how, state is not None))
