"""A worker of a group: gets checkpoints of it, each under a lease and a claim, and settles them."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable

from distckpt.directory import sharing
from distckpt.directory.groups import Group
from distckpt.directory.lease import HeldLease
from distckpt.directory.sharing import Offer, Settings
from distckpt.errors import CheckpointNotFoundError, StoreOutcomeUnknownError
from distckpt.evaluation.deliveries import Delivery
from distckpt.evaluation.newest import KnownLog
from distckpt.evaluation.onlooker import Onlooker
from distckpt.format.json.group import Claim, GroupState, Kind
from distckpt.format.json.log import State
from distckpt.storage import Store

LAST_PAUSE = 1.0
"""How often a worker that has nothing to do looks what becomes of the last checkpoints, once the run is over."""


class Worker:
    """One worker of a group. It gets what nobody has, what was given back, and what a dead worker had.

    It may settle in other threads than it gets.
    """

    def __init__(
        self, store: Store, group: str, worker: str, settings: Settings, lease_seconds: float, backoff: float
    ) -> None:
        """Makes the group if there is none. Raises what ``Group.join`` raises."""
        self._store = store
        self._group = Group(store, group, worker)
        self._log = KnownLog(store)
        self._lease_seconds = lease_seconds
        self._backoff = backoff
        self._onlooker = Onlooker(store)
        self._own: set[str] = set()
        self._lock = threading.Lock()
        self._state = self._group.join(settings, self._log.look())

    @property
    def worker(self) -> str:
        """See Source."""
        return self._group.worker

    def get(self) -> Delivery | None:
        """See Source."""
        with self._lock:
            log = self._look()
            while True:
                try:
                    return self._next(log)
                except CheckpointNotFoundError:  # retired since the log was read: there may be another one
                    before, log = log, self._look()
                    if log is before:
                        return None

    def _look(self) -> State:
        self._state = self._group.read() or self._state
        return self._log.look(self._state)  # after the group: so it knows all that the group does

    def _next(self, log: State) -> Delivery | None:
        """What is offered first and we get. CheckpointNotFoundError if it is listed in this log and no more."""
        while True:
            dead = self._onlooker.dead(self._state, self._own)
            resting = self._onlooker.resting(self._state)
            offered = sharing.offer(sharing.moved(self._state, log), log, dead, resting)
            if offered is None:
                return None
            if offered.is_over:
                self._end(log, offered, dead, resting)
                continue
            holder = f"{self._group.worker}, group {self._group.name}"
            lease = HeldLease.take(self._store, offered.item.attempt, holder, self._lease_seconds)
            try:
                claim = self._claim(log, offered, lease, dead, resting)
            except BaseException:
                lease.release()
                raise
            if claim is not None:
                return Delivery(log.alive()[claim.attempt], lease, claim.delivery, _Claimed(self, claim))
            lease.release()

    def _claim(
        self, log: State, offered: Offer, lease: HeldLease, dead: frozenset[str], resting: dict[str, float]
    ) -> Claim | None:
        """The claim on what was offered; None if somebody else was faster."""
        item = offered.item
        claims = []

        def claim(offer: Offer) -> Claim:
            fields = item.order, item.name, item.number, item.attempt
            worker, token = self._group.worker, uuid.uuid4().hex
            claims.append(Claim(*fields, offer.delivery, offer.failures, worker, lease.id, self._lease_seconds, token))
            return claims[-1]

        def apply(state: GroupState) -> GroupState | None:
            self._state = state
            state = sharing.moved(state, log)
            now = sharing.offer(state, log, dead, resting)
            return sharing.claimed(state, log, now, dead, claim) if now == offered else None

        try:
            state = self._group.change("claim", apply)
        except StoreOutcomeUnknownError:
            # Others have gone on far, or the store does not say. If the group has it, it is ours; if it comes to have it later,
            # there is no lease, and somebody else gets it.
            state = self._group.read()
        if state is None or sharing.claim_of(state, claims[-1].token) is None:
            return None
        self._state = state
        self._own.add(claims[-1].token)
        self._onlooker.follow(state)
        return claims[-1]

    def _end(self, log: State, offered: Offer, dead: frozenset[str], resting: dict[str, float]) -> None:
        def apply(state: GroupState) -> GroupState | None:
            self._state = state
            state = sharing.moved(state, log)
            still = sharing.offer(state, log, dead, resting) == offered
            return sharing.ended(state, log, offered, dead, time.time()) if still else None

        with contextlib.suppress(StoreOutcomeUnknownError):  # what there is now is looked at next
            self._state = self._group.change("skip" if offered.is_stale else "reject", apply) or self._state

    def ack(self, claim: Claim) -> bool:
        """Whether it counts; if not, somebody else has taken over."""
        return self._settle("ack", claim, lambda state: sharing.acknowledged(state, claim.token))

    def release(self, claim: Claim) -> bool:
        """Give it back without blame; whether it was still ours."""
        return self._settle("release", claim, lambda state: sharing.released(state, claim.token, self._backoff))

    def reject(self, claim: Claim, error: str) -> bool:
        """Give it back with blame; whether it was still ours."""
        now = time.time()
        return self._settle(
            "reject", claim, lambda state: sharing.rejected(state, claim.token, error, self._backoff, now)
        )

    def _settle(self, kind: Kind, claim: Claim, apply: Callable[[GroupState], GroupState | None]) -> bool:
        with self._lock:
            self._own.discard(claim.token)
            state = self._group.change(kind, apply)
            self._state = state or self._state
            return state is not None

    def is_drained(self) -> bool:
        """See Source. Those that others still work on are left: they may have to be taken over."""
        with self._lock:
            log = self._log.state
            return log.ended and sharing.is_done(self._state, log)

    def pause(self) -> float:
        """See Source."""
        with self._lock:
            seconds = self._onlooker.pause(self._state, self._own)
        return min(seconds, LAST_PAUSE) if self._log.state.ended else seconds


class _Claimed:
    """How a claim is settled."""

    def __init__(self, worker: Worker, claim: Claim) -> None:
        self._worker = worker
        self._claim = claim

    def ack(self) -> bool:
        return self._worker.ack(self._claim)

    def release(self) -> bool:
        return self._worker.release(self._claim)

    def reject(self, error: str) -> bool:
        return self._worker.reject(self._claim, error)
