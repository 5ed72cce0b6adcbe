"""A rank's part in the stops of the whole cluster: it tells the coordinator, and hears of what others have told it."""

from __future__ import annotations

import logging
import threading
import time
import weakref

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import AwaitStop, Members, StopState, merged_members
from distckpt.errors import CoordinatorError, FencedError, StaleRunError
from distckpt.threads.coordinator import Listener
from distckpt.threads.report import StopReport, report_of
from distckpt.world import World

logger = logging.getLogger(__name__)

SIGNS = 4
"""How many signs of life a rank gives in the time after which its silence counts as death."""

MOST_PATIENCE = 15.0
ANSWER_SECONDS = 60.0
PAUSE_SECONDS = 1.0
TELL_SECONDS = 5.0
"""How long a rank that leaves waits until what it has reported has been heard."""


class RankCluster:
    """All ranks of a run, as one of them sees them. See ``threads.Cluster``. Starts nothing until somebody joins."""

    def __init__(self, client: Client, world: World) -> None:
        self._client = client
        self._world = world
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._generation = 0
        self._memberships: weakref.WeakSet[RankMembership] = weakref.WeakSet()

    @property
    def rank(self) -> int:
        """Which rank this process is."""
        return self._world.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._world.size

    @property
    def host(self) -> str:
        """The name of this rank's host."""
        return self._world.host

    def join(self, listener: Listener, silence_timeout: float) -> RankMembership:
        """See ``threads.Cluster.join``. CoordinatorError if the manager of this cluster has been closed."""
        with self._lock:
            if self._closed.is_set():
                raise CoordinatorError("the manager of this cluster has been closed; take the cluster of another one")
            self._generation += 1
            membership = RankMembership(
                self._client, self.rank, self.host, self._generation, listener, silence_timeout, self._closed
            )
            self._memberships.add(membership)
        membership.start()
        return membership

    def fail(self, error: BaseException) -> None:
        """Every Coordinator of this rank stops with ``error``, if it has not stopped before."""
        for membership in list(self._memberships):
            membership.fail(error)

    def close(self) -> None:
        """Wait a moment until what was reported has been heard, and take part in nothing any more."""
        deadline = time.monotonic() + TELL_SECONDS
        with self._lock:
            self._closed.set()
        for membership in list(self._memberships):
            membership.close(max(0.0, deadline - time.monotonic()))


class RankMembership:
    """One rank in one generation. See ``threads.Membership``. Gives a sign of life often enough to count as alive."""

    def __init__(
        self,
        client: Client,
        rank: int,
        host: str,
        generation: int,
        listener: Listener,
        silence_timeout: float,
        closed: threading.Event,
    ) -> None:
        self._client = client
        self._rank = rank
        self._host = host
        self._generation = generation
        self._listener = listener
        self._silence_timeout = silence_timeout
        self._closed = closed
        self._lock = threading.Lock()
        self._members: Members = {rank: host}
        self._known: StopReport | None = None
        self._mine: StopReport | None = None
        self._is_deaf = False
        self._left = False
        self._settled = threading.Event()

    def start(self) -> None:
        """Begin to listen."""
        threading.Thread(target=self._listen, name="distckpt-stops", daemon=True).start()

    def report(self, error: BaseException | None) -> None:
        """See ``threads.Membership.report``."""
        self._mine = report_of(self._rank, self._host, error)
        threading.Thread(target=self._tell, name="distckpt-report", daemon=True).start()

    def settle(self, timeout: float) -> bool:
        """See ``threads.Membership.settle``."""
        return self._settled.wait(timeout)

    def leave(self) -> None:
        """See ``threads.Membership.leave``. Takes no lock, for it may be called while garbage is collected."""
        self._left = True

    def fail(self, error: BaseException) -> None:
        """The Coordinator stops with ``error``, and all ranks with it."""
        self._listener.fail(error)

    def close(self, timeout: float) -> None:
        """Leave, but give what was reported ``timeout`` seconds to be heard."""
        if self._mine is not None and not self.settle(timeout):
            logger.warning("rank %d leaves before the others could be told that it stops", self._rank)
        self.leave()
        self._settled.set()

    def _listen(self) -> None:
        patience = min(self._silence_timeout / SIGNS, MOST_PATIENCE)
        while not self._left:
            self._await_stop(patience)
        if not self._closed.is_set():  # else the whole rank has left
            self._await_stop(0.0)

    def _tell(self) -> None:
        while not self._settled.is_set():
            self._await_stop(0.0)

    def _await_stop(self, patience: float) -> None:
        try:
            self._hear(patience)
            self._is_deaf = False
        except Exception as error:  # noqa: BLE001 - whatever it is that keeps the answer away may pass
            self._cannot_hear(error)

    def _hear(self, patience: float) -> None:
        leaving = self._left
        try:
            reply = self._client.ask(
                AwaitStop(
                    self._generation,
                    self._known or self._mine,
                    self._members,
                    None if leaving else self._silence_timeout,
                    patience,
                ),
                patience + ANSWER_SECONDS,
            )
        except (FencedError, StaleRunError) as error:
            self._lost(error)
        else:
            if isinstance(reply, StopState):
                self._learn(reply)

    def _cannot_hear(self, error: Exception) -> None:
        if not self._is_deaf and not self._left:
            self._is_deaf = True
            logger.warning("rank %d cannot hear of stops of other ranks, trying again: %s", self._rank, error)
        time.sleep(PAUSE_SECONDS)

    def _learn(self, state: StopState) -> None:
        with self._lock:
            self._members = merged_members(self._members, state.members)
            if state.stop is None:
                return
            # After a restart the coordinator may have heard another report first; this rank keeps to what it was told.
            if self._known is None and not self._left:
                self._listener.hear(self, state.stop)
            self._known = state.stop
            self._settled.set()

    def _lost(self, error: CoordinatorError) -> None:
        """The coordinator turns this rank away: it will hear of no stop any more, so it stops by itself."""
        if not self._left:
            self._listener.hear(self, error)
        self.leave()
        self._settled.set()
