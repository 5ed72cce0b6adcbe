"""Simulated readers: they take real leases, by the rules of ``directory.lease``, on machines that stop for a while."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from distckpt.coordinator.messages import Reply
from distckpt.directory.lease import Term
from distckpt.format.json.log import CheckpointRecord
from distckpt.testing.history import Content, Held, LetGo, Returned
from distckpt.testing.sim_ranks import Process, Say, Sleep, Task
from distckpt.testing.sim_store import SimulatedLease
from distckpt.testing.sim_world import LATEST, Clocks, SimulatedWorld

LEASE_SECONDS = 8.0

Steps = Generator[Sleep | Say, Reply | None, None]


@dataclass(slots=True)
class Holding:
    """A lease in a reader's memory. ``held`` once it has looked, and until it lets go or has lost it."""

    id: str
    attempt: str
    term: Term
    beat: int = 0
    held: bool = False
    released: bool = False


class Reader(Process):
    """An evaluation process: leases some checkpoint, makes sure that it is not retiring, and reads it."""

    def __init__(self, world: SimulatedWorld, name: str) -> None:
        super().__init__(world, lambda request, reply: None)
        self.name = name
        self._clocks = Clocks(world)
        self._frozen_until = 0.0
        self._holding: Holding | None = None
        self.start(self._live())

    def kill(self) -> None:
        """It reads no more. Its lease stays behind."""
        super().kill()
        if self._holding is not None:
            self._let_go(self._holding)

    def _resume(self, task: Task, value: Reply | None) -> None:
        if self.up and self._frozen_until > self.world.time:
            self.world.later(self._frozen_until - self.world.time, lambda: self._resume(task, value))
        else:
            super()._resume(task, value)

    def _live(self) -> Task:
        while True:
            yield Sleep(self.world.random.uniform(0.5, 4.0))
            records = yield from self._listed()
            if records:
                yield from self._read(self.world.random.choice(records))

    def _listed(self) -> Generator[Sleep | Say, Reply | None, tuple[CheckpointRecord, ...]]:
        """What the newest entry lists. Listing the log and reading the entry are two steps."""
        while seq := self.world.store.newest():
            yield Sleep(self.world.latency() * 0.3)
            entry = self.world.store.log.get(seq)
            if entry is not None and entry.state.pages:
                yield Sleep(self.world.latency() * 0.3)
                entry = self.world.store.log.get(seq)  # else its pages may have gone with it
            if entry is not None:
                return tuple(self.world.store.whole(self.name, entry.state).alive().values())
        return ()

    def _read(self, record: CheckpointRecord) -> Steps:
        yield Sleep(self.world.random.uniform(0.0, 3.0))
        term = Term(LEASE_SECONDS, self._clocks.elapsed())
        self._holding = holding = Holding(f"lease {self.world.unique()}", record.attempt, term)
        is_written = yield from self._write(holding)
        alive = (record,) if "look_before_lease" in self.world.unsafe else (yield from self._listed())
        if is_written and record in alive and not self._lost(holding):
            holding.held = True
            self.world.history.add(Held(self.name, record.attempt))
            self._watch_the_end(holding)
            self.start(self._renew(holding))
            yield from self._use(holding, record)
        self._release(holding)

    def _use(self, holding: Holding, record: CheckpointRecord) -> Steps:
        shards: dict[str, Content] = {}
        for rank in range(record.world_size):
            yield Sleep(self.world.random.uniform(0.1, 5.0))
            content = self.world.store.get(record.attempt, str(rank))
            if self._lost(holding):
                return
            if content is not None:
                shards[str(rank)] = content
        self.world.history.add(Returned(self.name, record, shards))

    # ---- the lease -------------------------------------------------------------------------------------------------

    def _lost(self, holding: Holding) -> bool:
        return "outlive_lease" not in self.world.unsafe and holding.term.has_ended(self._clocks.elapsed())

    def _write(self, holding: Holding) -> Generator[Sleep | Say, Reply | None, bool]:
        """Write it once more; whether it is known to be there. What was given up may be done much later all the same."""
        world, faults = self.world, self.world.faults
        beat, attempt = holding.beat, holding.attempt
        expires = self._clocks.wall() + LEASE_SECONDS
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

    def _renew(self, holding: Holding) -> Steps:
        while True:
            yield Sleep(LEASE_SECONDS / 4)
            if self.world.random.random() < self.world.faults.frozen_reader:
                self._frozen_until = self.world.time + self.world.random.uniform(1.0, 40.0)
                yield Sleep(0.0)
            if holding.released or self._lost(holding):
                return
            began = self._clocks.elapsed()
            if (yield from self._write(holding)):
                holding.term.renewed(began, self._clocks.elapsed())

    def _watch_the_end(self, holding: Holding) -> None:
        """Put down when it is lost, which is so at once, also while nobody here can notice."""
        if self._lost(holding):
            self._let_go(holding)
        elif holding.held:
            wait = self._clocks.until(holding.term.end)
            self.world.later(max(wait, 0.01), lambda: self._watch_the_end(holding))

    def _release(self, holding: Holding) -> None:
        self._let_go(holding)
        holding.released = True
        self.world.store.drop_lease(holding.id)

    def _let_go(self, holding: Holding) -> None:
        if holding.held:
            holding.held = False
            self.world.history.add(LetGo(self.name))
