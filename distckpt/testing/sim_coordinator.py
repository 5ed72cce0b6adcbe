"""A simulated coordinator: the real machine, and hands that are slow, fail, die between two steps, or freeze."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator
from dataclasses import replace
from functools import partial
from typing import cast

import msgspec

from distckpt.coordinator.machine.actions import (
    Action,
    Answer,
    Append,
    Appended,
    AppendRefused,
    AppendUnknown,
    Asked,
    CollectGarbage,
    Delete,
    Deleted,
    Event,
    Exit,
    LeasesRead,
    MakePlan,
    NameTaken,
    NewestRead,
    PagesRead,
    PageWritten,
    PlanMade,
    Publish,
    Published,
    ReadLeases,
    ReadNewest,
    ReadPages,
    ReadTail,
    RoomMade,
    Seal,
    Sealed,
    SkipsTold,
    StepFailed,
    TailRead,
    TellSkips,
    Tick,
    WritePage,
)
from distckpt.coordinator.machine.following import Followed
from distckpt.coordinator.machine.machine import Machine
from distckpt.coordinator.messages import Committed, FromRank, Reply, Request
from distckpt.coordinator.shell.needs import following
from distckpt.directory import sharing
from distckpt.directory.pages import Known
from distckpt.directory.stillness import Stillness
from distckpt.errors import DamagedError, DistckptError, PlanError, SaveError, StoreOutcomeUnknownError
from distckpt.format.json.group import GroupState
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.paging import Records, ref_of
from distckpt.format.names import attempt_epoch
from distckpt.testing.history import INDEX, MANIFEST, GroupsRead, Promised, Whole
from distckpt.testing.sim_groups import change, newest
from distckpt.testing.sim_ranks import Sleep
from distckpt.testing.sim_requests import Creation, Outcome
from distckpt.testing.sim_store import SimulatedPlan, make_plan, record_of
from distckpt.testing.sim_world import LATEST, Clocks, SimulatedWorld

GARBAGE_AGE = 15.0
NAME = "ckpt"


class SimulatedCoordinator:
    """One coordinator process, with a wall clock of its own that is wrong and may jump."""

    def __init__(self, world: SimulatedWorld, name: str) -> None:
        self.name = name
        self.up = True
        self.machine = Machine("sim://run", name, idle_timeout=None, sizes=world.sizes)
        self._world = world
        self._clocks = Clocks(world)
        self._leases = Stillness()
        self._leased: frozenset[str] | None = None
        self._followed: Followed | None = None
        self._garbage = Stillness()
        self._frozen_until = 0.0
        self._backlog: list[Callable[[], None]] = []
        self._callers: dict[int, tuple[Request, Callable[[Reply], None]]] = {}
        self._tick_at: float | None = None
        self._tried: set[str] = set()
        self._seq = 0
        self.feed(Tick())

    # ---- life ------------------------------------------------------------------------------------------------------

    def receive(self, request: Request, reply: Callable[[Reply], None]) -> None:
        """A request has come in; ``reply`` carries its answer, if there ever is one."""
        ticket = self._world.unique()
        self._callers[ticket] = (request, reply)
        self._now(lambda: self.feed(Asked(ticket, request)))

    def die(self) -> None:
        """Stop in the middle of whatever it does."""
        self.up = False
        self._backlog.clear()

    def freeze(self, seconds: float) -> None:
        """Do nothing at all for a while, then go on as if nothing had happened."""
        self._frozen_until = self._world.time + seconds
        self._world.later(seconds, self._thaw)

    def feed(self, event: Event) -> None:
        """Step the machine and begin what it asks for."""
        for action in self.machine.step(event, self._clocks.wall(), self._world.time):
            self._perform(action)
        self._plan_tick()

    def _thaw(self) -> None:
        backlog, self._backlog = self._backlog, []
        for step in backlog:
            self.later(step)

    def later(self, step: Callable[[], None], slowness: float = 1.0) -> None:
        """See ``sim_requests.Later``."""
        self._world.later(self._world.latency() * slowness, lambda: self._now(step))

    def _now(self, step: Callable[[], None]) -> None:
        if not self.up:
            return
        if self._frozen_until > self._world.time:
            self._backlog.append(step)
        else:
            step()

    def _plan_tick(self) -> None:
        deadline = self.machine.next_deadline()
        if deadline is not None and (self._tick_at is None or deadline < self._tick_at):
            self._tick_at = deadline
            self._world.later(max(0.0, deadline - self._world.time) + 0.001, lambda: self._now(self._tick))

    def _tick(self) -> None:
        self._tick_at = None
        self.feed(Tick())

    # ---- effects ---------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        match action:
            case Answer(ticket, reply):
                self._answer(ticket, reply)
            case ReadTail():
                self.later(self._read_tail)
            case Append(entry):
                self._seq = entry.seq
                self._append(entry)
            case ReadNewest():
                self.later(self._read_newest)
            case ReadPages():
                self.later(lambda: self._read_pages(action))
            case WritePage():
                self._write_page(action)
            case MakePlan():
                self.later(lambda: self._make_plan(action))
            case Seal():
                self.later(lambda: self._write_index(action))
            case ReadLeases():
                self.later(lambda: self._read_leases(action))
            case TellSkips():
                self._do(self._tell_skips(action))
            case Delete(records):
                self._erase([record.attempt for record in records], [])
            case CollectGarbage():
                self.later(lambda: self._collect(action))
            case Publish(entry):
                self.later(lambda: self._publish(entry))
            case Exit():
                self._world.later(0.0, self.die)

    def _answer(self, ticket: int, reply: Reply) -> None:
        request, send = self._callers.pop(ticket)
        if isinstance(reply, Committed):
            self._world.history.add(
                Promised(self.name, request.rank if isinstance(request, FromRank) else -1, reply.record)
            )
        send(reply)

    def _read_tail(self) -> None:
        entry = self._world.store.log.newest_entry()
        if entry is None:
            self.later(lambda: self.feed(TailRead(0, None)))
            return
        known = entry.state.known()
        complete = []
        for attempt in self._world.store.attempts:
            whole = self._world.store.complete(attempt)
            if attempt not in known and attempt_epoch(attempt) == entry.epoch and whole is not None:
                complete.append(record_of(NAME, attempt, whole))
        self.later(lambda: self.feed(TailRead(entry.seq, entry, tuple(complete))))

    def _append(self, entry: Entry) -> None:
        world = self._world
        if entry.commit_id not in self._tried and entry.kind == "commit":
            self._tried.add(entry.commit_id)  # whether a reader would take it does not change
            if world.random.random() < world.faults.refused_commit:
                self.later(lambda: self.feed(AppendRefused(entry, "too long to be read")))
                return
        world.about_to_append(self)
        Creation(world, world.store.log, self.name, entry, self.later, self._created, "no_read_back").begin()

    def _created(self, entry: Entry, outcome: Outcome, found: Entry | None) -> None:
        if outcome == "appended":
            self.feed(Appended(entry, self._newest(entry)))
        elif outcome == "taken" and "old_epochs_count" in self._world.unsafe and found and found.epoch > entry.epoch:
            self._append(msgspec.structs.replace(entry, seq=self._world.store.log.newest() + 1))
        elif outcome == "taken":
            self.feed(NameTaken(entry, found, self._newest(entry)))
        else:
            self.feed(AppendUnknown(entry, "no answer"))

    def _newest(self, entry: Entry) -> int:
        return entry.seq if "ignore_newest" in self._world.unsafe else self._world.store.log.newest()

    def _read_newest(self) -> None:
        if self._world.random.random() < self._world.faults.failed_look:
            self.later(lambda: self.feed(NewestRead(None, "cannot list")))
            return
        newest = self._seq if "restore_unasked" in self._world.unsafe else self._world.store.log.newest()
        self.later(lambda: self.feed(NewestRead(newest)))

    def _read_pages(self, action: ReadPages) -> None:
        world = self._world
        found: dict[str, Records] = {}
        failed: dict[str, DistckptError] = {}
        for page in action.pages:
            records = world.store.pages.get(page.id)
            if records is None or world.random.random() < world.faults.failed_page:
                failed[page.id] = DamagedError(page.id, "cannot be read")
            else:
                found[page.id] = records
        self.later(lambda: self.feed(PagesRead(action.asked, found, failed)))

    def _write_page(self, action: WritePage) -> None:
        """It is there in time, or late, or never; and in doubt nobody needs it."""
        world, faults = self._world, self._world.faults
        fate = world.pick(late=faults.late_write, never=faults.failed_write, lost=faults.lost_acknowledgement)

        def put() -> None:
            world.store.put_page(action.page, action.records)

        def arrive() -> None:
            put()
            if not fate:
                ref = ref_of(action.page, action.of, action.records, 1, 1)
                self.later(lambda: self.feed(PageWritten(action.page, ref)))

        if fate == "late":
            world.later(world.random.uniform(0.0, LATEST), put)
        elif fate != "never":
            world.later(world.latency(), arrive)
        if fate:
            world.later(2.0, lambda: self.later(lambda: self.feed(PageWritten(action.page, None))))

    def _make_plan(self, action: MakePlan) -> None:
        try:
            plan = make_plan(action.number, action.descriptions, action.staged, action.attempt)
        except PlanError as error:
            self.feed(StepFailed(action.attempt, error))
        else:
            self.feed(PlanMade(action.attempt, plan))

    def _write_index(self, action: Seal) -> None:
        plan = cast(SimulatedPlan, action.plan)
        whole = Whole(action.number, dict(enumerate(plan.owned)), plan.chunks, action.time)
        store = self._world.store
        missing = [rank for rank in range(plan.world_size) if store.get(action.attempt, str(rank)) is None]
        if missing or self._world.random.random() < self._world.faults.failed_seal:
            self.feed(StepFailed(action.attempt, SaveError(action.number, f"shards missing: {missing}")))
            return
        store.put(action.attempt, INDEX, whole, self._world.time)
        self._world.again(lambda: store.put_if_absent(action.attempt, INDEX, whole, self._world.time))
        self.later(lambda: self._write_manifest(action, whole))

    def _write_manifest(self, action: Seal, whole: Whole) -> None:
        store = self._world.store
        store.put(action.attempt, MANIFEST, whole, self._world.time)
        self._world.again(lambda: store.put_if_absent(action.attempt, MANIFEST, whole, self._world.time))
        if self._world.random.random() < self._world.faults.failed_seal:
            self.later(lambda: self.feed(StepFailed(action.attempt, SaveError(action.number, "no answer"))))
        else:
            self.later(lambda: self.feed(Sealed(action.attempt, 1, 1, whole.chunks)))

    def _read_leases(self, action: ReadLeases) -> None:
        if self._world.random.random() < 0.05:
            self.feed(LeasesRead(frozenset(), "cannot list"))
        elif self._leased is not None and "leases_before_retiring" in self._world.unsafe:
            seen, self._leased = self._leased, None
            self._do(self._read_groups(action, seen))
        else:
            asked = self._clocks.elapsed()
            self.later(lambda: self._look_at_leases(action, asked))

    def _look_at_leases(self, action: ReadLeases, asked: float) -> None:
        leases, answered, held = self._world.store.leases, self._clocks.elapsed(), set()
        for id, lease in list(leases.items()):
            still = self._leases.still_for(id, lease, asked=asked, answered=answered)
            has_expired = still >= lease.seconds
            if "wall_clock_leases" in self._world.unsafe:
                has_expired = lease.expires < self._clocks.wall()
            if has_expired:
                self.later(partial(self._world.store.drop_lease, id))
            else:
                held.add(lease.attempt)
        self._leases.forget_all_but(leases.keys())
        attempts = self._leased = frozenset(held)
        self._do(self._read_groups(action, attempts))

    def _read_groups(self, action: ReadLeases, leased: frozenset[str]) -> Generator[Sleep, None, None]:
        """After the leases, one group after the other."""
        store, groups = self._world.store, {}
        for name, chain in list(store.groups.items()):
            entry = yield from newest(self._world, chain)
            if entry is not None:
                groups[name] = entry.state
        if any(page.id not in store.pages or self._cannot_read() for page in action.state.pages):
            self.feed(LeasesRead(frozenset(), "cannot read a page"))
            return
        state = store.whole(self.name, action.state)
        found = {name: following(name, group, state) for name, group in groups.items()}
        self._world.history.add(GroupsRead(self.name, frozenset(found)))
        followed = Followed(tuple(found.values()), action.state.commits)
        if "retire_before_groups" in self._world.unsafe:
            before, self._followed = self._followed or Followed(), followed
            followed = replace(before, commits=followed.commits)
        if "news_is_nobodys" in self._world.unsafe:
            followed = replace(followed, commits=1 << 40)
        if "skips_untold" in self._world.unsafe:
            followed = followed.without_surplus()
        yield Sleep(self._world.latency())
        self.feed(LeasesRead(leased, followed=followed))

    def _tell_skips(self, action: TellSkips) -> Generator[Sleep, None, None]:
        done = True
        for group, records in action.skips.items():
            tail = self._world.store.log.newest_entry()
            assert tail is not None
            state = self._world.store.whole(self.name, tail.state)
            try:
                yield from change(self._world, self, group, "skip", partial(_skipped, log=state, records=records))
            except StoreOutcomeUnknownError:
                done = False
        self.feed(SkipsTold(done))

    def _do(self, steps: Generator[Sleep, None, None]) -> None:
        """Step after step, as long as it lives."""
        wish = next(steps, None)
        if wish is not None:
            self._world.later(wish.seconds, lambda: self._now(lambda: self._do(steps)))

    def _publish(self, entry: Entry) -> None:
        self._world.store.log.prune(entry.seq - self._world.random.choice([0, 0, 1, 3]))
        self.later(lambda: self.feed(Published(entry)))

    def _erase(self, attempts: list[str], done: list[str]) -> None:
        """One object after the other, manifests first; sometimes an attempt cannot be deleted today."""
        if not attempts:
            self.later(lambda: self.feed(Deleted(tuple(done))))
            return
        attempt = attempts[0]
        if self._world.random.random() < 0.1:
            self.later(lambda: self._erase(attempts[1:], done))
        else:
            self._erase_objects(attempt, lambda: self._erase(attempts[1:], [*done, attempt]))

    def _erase_objects(self, attempt: str, then: Callable[[], None]) -> None:
        names = self._world.store.names(attempt)
        if not names:
            then()
            return
        self._world.store.erase(self.name, attempt, names[0])
        self._world.again(lambda: self._world.store.erase(self.name, attempt, names[0]))
        self.later(lambda: self._erase_objects(attempt, then), 0.3)

    def _collect(self, action: CollectGarbage) -> None:
        world = self._world
        if action.urgent:
            self.later(lambda: self.feed(RoomMade()))
        if action.epoch == max((entry.epoch for entry in world.store.log.entries.values()), default=0):
            self._collect_pages(action)
        lost = [page for page in action.pages if page.id not in world.store.pages or self._cannot_read()]
        paged = {
            record.attempt
            for page in action.pages
            if page not in lost and "forget_pages" not in world.unsafe
            for record in world.store.pages[page.id]
        }
        known = Known(action.known | paged, () if "forget_pages" in world.unsafe else lost)
        self._garbage.forget_all_but(world.store.attempts.keys())
        old = [attempt for attempt in world.store.attempts if action.urgent or self._is_old(action, attempt)]
        for attempt in sorted(old):
            if self._is_garbage(action, attempt, known):
                self.later(lambda attempt=attempt: self._erase_objects(attempt, _nothing))  # type: ignore[misc]

    def _cannot_read(self) -> bool:
        return self._world.random.random() < self._world.faults.failed_page

    def _collect_pages(self, action: CollectGarbage) -> None:
        """At once, though real ones watch them for a while first: what is safe does not hang on that."""
        store = self._world.store
        needed = {page.id for page in action.pages} if "collect_pages" in self._world.unsafe else store.referred()
        for page in sorted(store.pages.keys() - needed):
            if attempt_epoch(page) < action.epoch or page in action.dropped or "collect_pages" in self._world.unsafe:
                store.erase_page(self.name, page)

    def _is_old(self, action: CollectGarbage, attempt: str) -> bool:
        """Whether it has been watched for long enough. What predecessors had begun need not be."""
        objects = self._world.store.attempts[attempt]
        if "collect_by_age" in self._world.unsafe:
            return all(stored.written < self._world.time - GARBAGE_AGE for stored in objects.values())
        now = self._clocks.elapsed()
        still = self._garbage.still_for(attempt, frozenset(objects), asked=now, answered=now)
        return attempt_epoch(attempt) < action.epoch or still >= GARBAGE_AGE

    def _is_garbage(self, action: CollectGarbage, attempt: str, known: Container[str]) -> bool:
        if "collect_by_age" in self._world.unsafe:
            return attempt not in known and attempt not in action.live
        epoch = attempt_epoch(attempt)
        return (epoch < action.epoch and attempt not in known) or attempt in action.failed


def _skipped(state: GroupState | None, log: State, records: tuple[CheckpointRecord, ...]) -> GroupState | None:
    return sharing.skipped(sharing.moved(state, log), records) if state is not None else None


def _nothing() -> None:
    pass
