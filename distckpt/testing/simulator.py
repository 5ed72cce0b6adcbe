"""A whole job in simulated time: ranks, readers, coordinators that crash, freeze and come back, and a bad network.

``simulate(seed)`` plays one such story and returns its history; ``history.broken_promises`` says what it broke. The
same seed always gives the same story, so a failure is replayed by its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from distckpt.coordinator.messages import Pin, Reply, Request
from distckpt.directory.sharing import Settings, waiting
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Retention
from distckpt.testing.history import CameBack, Drained, History
from distckpt.testing.sim_coordinator import SimulatedCoordinator
from distckpt.testing.sim_groups import Member
from distckpt.testing.sim_ranks import Job, Rank
from distckpt.testing.sim_readers import Reader
from distckpt.testing.sim_world import Faults, SimulatedWorld

UNSAFE = {
    "ignore_newest": "an append counts although a listing after it shows higher numbers",
    "overwrite": "the store overwrites log entries instead of refusing to",
    "restore_unasked": "what was restored is told without a look whether the log has anything newer",
    "collect_by_age": "garbage is whatever is old and was not known when the collection was asked for",
    "forget_pages": "what only a page knows is garbage like all that nobody knows",
    "collect_pages": "pages are garbage that the state of whoever collects does not refer to, whatever else does",
    "old_epochs_count": "whose entry finds one of a newer epoch in its place goes on after that",
    "look_before_lease": "a reader looks whether its checkpoint is alive and then writes its lease",
    "leases_before_retiring": "what is deleted goes by the leases that were read before it retired",
    "outlive_lease": "a reader that could not renew its lease in time goes on",
    "wall_clock_leases": "a lease says when it expires by its holder's clock, and others compare that with theirs",
    "no_group_read_back": "as no_read_back, of the entries of groups",
    "ignore_group_newest": "as ignore_newest, of the entries of groups",
    "ack_without_token": "an acknowledgement counts whatever has become of the claim",
    "retire_before_groups": "what retires goes by what groups wanted when it was looked the time before",
    "news_is_nobodys": "what was committed after the groups were read retires like any other",
    "skips_untold": "what a group that lags does not get retires, and then the group is told",
    "no_read_back": "an entry whose creation was refused or not answered counts as another's, and nobody looks",
}
"""Rules that a simulation can be told to break, to show that it would notice."""

TROUBLE_SECONDS = 40.0
CALM_SECONDS = 600.0
DRAIN_SECONDS = 200.0


class Simulation:
    """One story. ``unsafe`` names rules of ``UNSAFE`` to break."""

    def __init__(self, seed: int, unsafe: Iterable[str] = ()) -> None:
        broken = frozenset(unsafe)
        if broken - set(UNSAFE):
            raise ValueError(f"no such rules: {sorted(broken - set(UNSAFE))}")
        self.world = SimulatedWorld(seed, Faults(), broken)
        self.coordinators: list[SimulatedCoordinator] = []
        self.ranks: list[Rank] = []
        self.readers: list[Reader] = []
        self.members: list[Member] = []
        self.groups: dict[str, Settings] = {}
        self._everyone: list[Rank] = []
        self._home: list[SimulatedCoordinator] = []
        self._calm = False
        self._draw_faults()
        self.world.about_to_append = self._maybe_freeze

    def play(self) -> History:
        """Trouble first, then calm, then a new job that must come back by itself."""
        self._replace_coordinator()
        self._start_job()
        for _ in range(2):
            self._start_reader()
        for group in range(self.world.random.choice([0, 1, 1, 2])):
            self._begin_group(f"group-{group}")
        self.world.later(1.0, self._trouble)
        self.world.run(TROUBLE_SECONDS)
        self._settle()
        self._come_back()
        return self.world.history

    # ---- the story -------------------------------------------------------------------------------------------------

    def _draw_faults(self) -> None:
        random, faults = self.world.random, self.world.faults
        for name, most in (
            ("slow", 0.05),
            ("lost_message", 0.2),
            ("doubled_message", 0.2),
            ("stale_address", 0.3),
            ("lost_acknowledgement", 0.2),
            ("late_write", 0.1),
            ("failed_write", 0.1),
            ("repeated_write", 0.1),
            ("late_repeat", 0.1),
            ("refused_commit", 0.1),
            ("failed_seal", 0.1),
            ("full_disk", 0.3),
            ("failed_rank", 0.05),
            ("missed_save", 0.1),
            ("lone_restore", 0.05),
            ("failed_read", 0.05),
            ("failed_look", 0.1),
            ("failed_page", 0.1),
            ("clock_jump", 0.01),
            ("frozen_reader", 0.4),
            ("freeze_at_append", 0.1),
            ("rejected", 0.5),
            ("released", 0.5),
        ):
            setattr(faults, name, random.choice([0.0, random.uniform(0.0, most)]))

    def _job(self, saves: int) -> Job:
        random = self.world.random
        world_size = random.randint(1, 3)
        chunks = 2 * world_size + random.randint(0, 2)
        changes = [random.random() < 0.1 for _ in range(saves)]
        return Job(
            token=f"job-{self.world.unique()}",
            world_size=world_size,
            retention=Retention(random.choice([1, 2, 3, None]), random.choice([None, 0.0, 0.003, 0.01])),
            save_timeout=random.uniform(8.0, 20.0),
            buffers=random.randint(1, 2),
            skip_if_busy=random.random() < 0.2,
            chunks=tuple(chunks + sum(changes[: save + 1]) for save in range(saves)),
            recovers=tuple(random.random() < 0.1 for _ in range(saves)),
        )

    def _start_job(self, saves: int = 16) -> None:
        job, home = self._job(saves), list[SimulatedCoordinator]()
        self._home = home

        def send(request: Request, reply: Callable[[Reply], None]) -> None:
            self._send(request, reply, home)

        self.ranks = [Rank(self.world, send, job, rank) for rank in range(job.world_size)]
        self._everyone += self.ranks

    def _start_reader(self) -> None:
        self.readers.append(Reader(self.world, f"reader {len(self.readers)}"))

    def _begin_group(self, group: str) -> None:
        random = self.world.random
        self.groups[group] = Settings(
            mode=random.choice(["all", "all", "all", "latest"]),
            start=random.choice(["earliest", "latest"]),
            max_backlog=random.choice([0, 1, 2, 4, 16]),
            on_lag=random.choice(["skip", "hold", "block"]),
            max_attempts=random.randint(1, 3),
        )
        for _ in range(random.randint(1, 4)):
            self.world.later(random.choice([0.0, random.uniform(0.0, 30.0)]), lambda: self._start_member(group))

    def _start_member(self, group: str) -> None:
        name = f"worker {len(self.members)} of {group}"
        self.members.append(Member(self.world, name, group, self.groups[group]))

    def _trouble(self) -> None:
        if self._calm:
            return
        random = self.world.random
        kind = random.choice(
            ["crash", "freeze", "supersede", "split", "kill", "linger", "pin", "pin", "reader", "worker", "worker"]
        )
        if kind == "crash":
            self.coordinators[-1].die()
            self._replace_coordinator()
        elif kind == "freeze":
            self._freeze(self.coordinators[-1])
        elif kind == "supersede":
            self._replace_coordinator()
        elif kind == "split":
            self._split()
        elif kind == "pin":
            self._pin()
        elif kind == "worker":
            if self.members:
                killed = random.choice(self.members)
                killed.kill()
                self.world.later(random.uniform(0.0, 20.0), lambda: self._start_member(killed.group))
        elif kind == "reader":
            random.choice(self.readers).kill()
            self._start_reader()
        else:
            for rank in self.ranks:
                if kind == "kill" or random.random() < 0.5:
                    rank.kill()
            self._start_job()
        self.world.later(random.uniform(0.5, 12.0), self._trouble)

    def _split(self) -> None:
        """Another job begins elsewhere, with a coordinator of its own: both go on until one of them hears of that."""
        self._home.append(self.coordinators[-1])
        self._replace_coordinator()
        self._start_job()

    def _maybe_freeze(self, coordinator: object) -> None:
        if self.world.random.random() < self.world.faults.freeze_at_append and coordinator is self.coordinators[-1]:
            self._freeze(self.coordinators[-1])

    def _freeze(self, coordinator: SimulatedCoordinator) -> None:
        """A zombie: it wakes up when another has long taken over, or is just about to."""
        coordinator.freeze(self.world.random.choice([1.0, 5.0, 20.0]))
        self._replace_coordinator()

    def _replace_coordinator(self) -> None:
        name = f"{self.world.history.seed}-{len(self.coordinators)}"
        self.coordinators.append(SimulatedCoordinator(self.world, name))

    def _pin(self) -> None:
        entry = self.world.store.log.newest_entry()
        if entry is not None and entry.state.active:
            whole = self.world.store.whole("simulator", entry.state)
            number = self.world.random.choice(whole.active).number
            self._send(Pin(number, self.world.random.random() < 0.7), lambda reply: None)

    def _settle(self) -> None:
        """No more faults; whoever was frozen wakes up and finds out."""
        self._calm = True
        self.world.faults.heal()
        for group in self.groups:
            self._start_member(group)
        self.world.run(self.world.time + 40.0)

    def _come_back(self) -> None:
        healthy = any(coordinator.up for coordinator in self.coordinators)
        for rank in self._everyone:
            rank.kill()
        for coordinator in self.coordinators:
            coordinator.die()
        self._replace_coordinator()
        expected = self.world.store.log.newest_entry()
        self._start_job(saves=2)
        end = self.world.time + CALM_SECONDS
        while self.world.time < end and not all(rank.done for rank in self.ranks):
            self.world.run(self.world.time + 1.0)
        self._drain()
        lost = [str(error) for rank in self.ranks for error in rank.failed]
        if not healthy:
            lost.append("every coordinator stopped, although one must have been the last to claim")
        first = self.ranks[0]
        if not all(rank.done for rank in self.ranks):
            lost.append("the last job did not finish")
        elif not lost and len(first.saved) != (2 if not first.job.skip_if_busy else len(first.saved)):
            lost.append(f"the last job saved {len(first.saved)} checkpoints instead of 2")
        known = expected.state if expected is not None else None
        if known is not None and known.alive() and first.restored is None:
            lost.append("the last job restored nothing although there are checkpoints")
        self.world.history.add(
            CameBack(first.restored, tuple(sorted(first.saved, key=lambda record: record.number)), "; ".join(lost))
        )

    def _drain(self) -> None:
        """What groups want they get, if they have the time."""
        end = self.world.time + DRAIN_SECONDS
        while self.world.time < end and any(self._waiting(group) for group in self.groups):
            self.world.run(self.world.time + 1.0)
        for group in self.groups:
            self.world.history.add(Drained(group, self._waiting(group)))

    def _waiting(self, group: str) -> tuple[CheckpointRecord, ...]:
        store = self.world.store
        of_group, log = store.group(group).newest_entry(), store.log.newest_entry()
        return waiting(of_group.state, store.whole("", log.state)) if of_group is not None and log is not None else ()

    # ---- the network -----------------------------------------------------------------------------------------------

    def _send(
        self, request: Request, reply: Callable[[Reply], None], home: Sequence[SimulatedCoordinator] = ()
    ) -> None:
        """To the one at ``home`` if there is one, to the newest, or to one that the sender still knows; lost, late or twice."""
        world, faults = self.world, self.world.faults
        if world.random.random() < faults.lost_message:
            return
        target = [*self.coordinators, *home][-1]
        if world.random.random() < faults.stale_address:
            target = world.random.choice(self.coordinators)
        for _ in range(2 if world.random.random() < faults.doubled_message else 1):
            world.later(world.latency(), lambda: target.receive(request, lambda value: self._carry_back(reply, value)))

    def _carry_back(self, reply: Callable[[Reply], None], value: Reply) -> None:
        if self.world.random.random() >= self.world.faults.lost_message:
            self.world.later(self.world.latency(), lambda: reply(value))


def simulate(seed: int, unsafe: Iterable[str] = ()) -> History:
    """Play the story of ``seed`` and return what happened."""
    return Simulation(seed, unsafe).play()
