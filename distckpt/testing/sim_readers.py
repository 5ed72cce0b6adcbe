"""Simulated readers: they take real leases, by the rules of ``directory.lease``, on machines that stop for a while."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from distckpt.coordinator.messages import Reply
from distckpt.directory.lease import Term
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.testing.history import Content, Held, LetGo, Returned
from distckpt.testing.sim_ranks import Process, Say, Sleep, Task
from distckpt.testing.sim_store import SimulatedLease
from distckpt.testing.sim_world import LATEST, Clocks, SimulatedWorld

LEASE_SECONDS = 8.0

T = TypeVar("T")
Steps = Generator[Sleep | Say, Reply | None, T]


@dataclass(slots=True)
class Holding:
    """A lease in a reader's memory. ``held`` once it may read under it, and until it lets go or has lost it."""

    id: str
    attempt: str
    term: Term
    beat: int = 0
    held: bool = False
    released: bool = False


class Holder(Process):
    """A process that holds a lease at a time, with clocks of its own; sometimes it stands still."""

    def __init__(self, world: SimulatedWorld, name: str) -> None:
        super().__init__(world, lambda request, reply: None)
        self.name = name
        self.clocks = Clocks(world)
        self._frozen_until = 0.0
        self._holding: Holding | None = None

    def kill(self) -> None:
        """It reads no more. Its lease stays behind."""
        super().kill()
        if self._holding is not None:
            self._let_go(self._holding)

    def freeze(self) -> None:
        """Nothing goes on for a while, and then as if nothing had happened."""
        self._frozen_until = self.world.time + self.world.random.uniform(1.0, 40.0)

    def _resume(self, task: Task, value: Reply | None) -> None:
        if self.up and self._frozen_until > self.world.time:
            self.world.later(self._frozen_until - self.world.time, lambda: self._resume(task, value))
        else:
            super()._resume(task, value)

    def later(self, step: Callable[[], None], slowness: float = 1.0) -> None:
        """See ``sim_requests.Later``. It may stand still before the answer comes."""
        if self.world.random.random() < self.world.faults.freeze_at_append:
            self.freeze()
        self.world.later(self.world.latency() * slowness, lambda: self._now(step))

    def _now(self, step: Callable[[], None]) -> None:
        if self.up and self._frozen_until > self.world.time:
            self.world.later(self._frozen_until - self.world.time, lambda: self._now(step))
        elif self.up:
            step()

    def listed(self) -> Steps[State]:
        """What the newest entry says, with its pages. Listing the log, reading the entry and its pages are steps."""
        log = self.world.store.log
        while seq := log.newest():
            yield Sleep(self.world.latency() * 0.3)
            entry = log.entries.get(seq)
            if entry is not None and entry.state.pages:
                yield Sleep(self.world.latency() * 0.3)
                entry = log.entries.get(seq)  # else its pages may have gone with it
            if entry is not None:
                return self.world.store.whole(self.name, entry.state)
        return State()

    # ---- the lease -------------------------------------------------------------------------------------------------

    def take(self, attempt: str) -> Steps[Holding | None]:
        """A lease that is renewed from now on; None if it may have come too late, or was lost again."""
        term = Term(LEASE_SECONDS, self.clocks.elapsed())
        self._holding = holding = Holding(f"{self.world.unique():032x}", attempt, term)
        is_written = yield from self._write(holding)
        if is_written:
            self.start(self._renew(holding))
        alive = {attempt: None} if "look_before_lease" in self.world.unsafe else (yield from self.listed()).alive()
        if is_written and attempt in alive and not self.lost(holding):
            return holding
        self.release(holding)
        return None

    def hold(self, holding: Holding) -> None:
        """From now on it may read under that."""
        holding.held = True
        self.world.history.add(Held(self.name, holding.attempt))
        self._watch_the_end(holding)

    def lost(self, holding: Holding) -> bool:
        """Whether it knows by its own clock that it may be too late."""
        return "outlive_lease" not in self.world.unsafe and holding.term.has_ended(self.clocks.elapsed())

    def release(self, holding: Holding) -> None:
        """Give it up."""
        self._let_go(holding)
        holding.released = True
        self.world.store.drop_lease(holding.id)

    def use(self, holding: Holding, record: CheckpointRecord, pace: float = 1.0) -> Steps[bool]:
        """Read all of it, mostly slowly; whether the lease was there to the end."""
        shards: dict[str, Content] = {}
        for rank in range(record.world_size):
            yield Sleep(self.world.random.uniform(0.1, 5.0) * pace)
            content = self.world.store.get(record.attempt, str(rank))
            if self.lost(holding):
                return False
            if content is not None:
                shards[str(rank)] = content
        self.world.history.add(Returned(self.name, record, shards))
        return True

    def _write(self, holding: Holding) -> Steps[bool]:
        """Write it once more; whether it is known to be there. What was given up may be done much later all the same."""
        world, faults = self.world, self.world.faults
        beat, attempt = holding.beat, holding.attempt
        expires = self.clocks.wall() + LEASE_SECONDS
        holding.beat += 1

        def land() -> None:
            world.store.leases[holding.id] = SimulatedLease(attempt, LEASE_SECONDS, beat, expires, world.time)

        fate = world.pick(never=faults.failed_write, late=faults.late_write)
        yield Sleep(world.latency())
        if fate == "late":
            world.later(world.random.uniform(0.0, LATEST), land)
        elif not fate:
            land()
            world.again(land)
            yield Sleep(world.latency())
        return not fate

    def _renew(self, holding: Holding) -> Steps[None]:
        while True:
            yield Sleep(LEASE_SECONDS / 4)
            if self.world.random.random() < self.world.faults.frozen_reader:
                self.freeze()
                yield Sleep(0.0)
            if holding.released or self.lost(holding):
                return
            began = self.clocks.elapsed()
            if (yield from self._write(holding)):
                holding.term.renewed(began, self.clocks.elapsed())

    def _watch_the_end(self, holding: Holding) -> None:
        """Put down when it is lost, which is so at once, also while nobody here can notice."""
        if self.lost(holding):
            self._let_go(holding)
        elif holding.held:
            wait = self.clocks.until(holding.term.end)
            self.world.later(max(wait, 0.01), lambda: self._watch_the_end(holding))

    def _let_go(self, holding: Holding) -> None:
        if holding.held:
            holding.held = False
            self.world.history.add(LetGo(self.name))


class Reader(Holder):
    """An evaluation process: leases some checkpoint, makes sure that it is not retiring, and reads it."""

    def __init__(self, world: SimulatedWorld, name: str) -> None:
        super().__init__(world, name)
        self.start(self._live())

    def _live(self) -> Task:
        while True:
            yield Sleep(self.world.random.uniform(0.5, 4.0))
            records = tuple((yield from self.listed()).alive().values())
            if not records:
                continue
            record = self.world.random.choice(records)
            yield Sleep(self.world.random.uniform(0.0, 3.0))
            holding = yield from self.take(record.attempt)
            if holding is not None:
                self.hold(holding)
                yield from self.use(holding, record)
                self.release(holding)
