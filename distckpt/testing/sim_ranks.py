"""Simulated ranks. They follow the protocol of ``coordinator.messages`` and send again what is not answered."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from distckpt.coordinator.messages import (
    AwaitPlan,
    Committed,
    Describe,
    Fail,
    FillFrom,
    FinishWith,
    FromRank,
    Heartbeat,
    Join,
    Joined,
    KeyMatch,
    Lag,
    Late,
    Leave,
    MakeRoom,
    MatchWith,
    OpenRun,
    Planned,
    RankRequest,
    Receipt,
    Refused,
    Reply,
    Request,
    Restore,
    Restored,
    RunOpened,
    Skipped,
    Unknown,
)
from distckpt.errors import CoordinatorUnavailableError, DistckptError, FencedError, SaveError, StaleRunError
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.json.log import CheckpointRecord
from distckpt.keep import Retention
from distckpt.testing.history import (
    Agreed,
    Content,
    Filled,
    Finished,
    Matched,
    Piece,
    ReadWhole,
    Returned,
)
from distckpt.testing.sim_store import describe
from distckpt.testing.sim_world import SimulatedWorld

MATCH = KeyMatch(b"", 1)


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let simulated seconds pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Say:
    """Send a request, again and again until it is answered."""

    request: Request


Task = Generator[Sleep | Say, Reply | None, None]


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank of one incarnation does: ``chunks`` says how many it holds at its k-th save, before which it
    restores if ``recovers`` says so."""

    token: str
    world_size: int
    retention: Retention
    save_timeout: float
    buffers: int
    skip_if_busy: bool
    chunks: tuple[int, ...]
    recovers: tuple[bool, ...]


class Process:
    """Runs tasks until it is killed. ``send`` carries one message; the reply may come never, or twice."""

    def __init__(self, world: SimulatedWorld, send: Callable[[Request, Callable[[Reply], None]], None]) -> None:
        self.up = True
        self.world = world
        self._send = send

    def start(self, task: Task) -> None:
        """Run a task beside the others."""
        self._resume(task, None)

    def kill(self) -> None:
        """Nothing of it goes on. What it has sent is still under way."""
        self.up = False

    def _resume(self, task: Task, value: Reply | None) -> None:
        if not self.up:
            return
        try:
            wish = task.send(value)
        except StopIteration:
            return
        if isinstance(wish, Sleep):
            self.world.later(wish.seconds, lambda: self._resume(task, None))
        else:
            self._say(task, wish.request)

    def _say(self, task: Task, request: Request) -> None:
        answered = False

        def reply(value: Reply) -> None:
            nonlocal answered
            if not answered:
                answered = True
                self._resume(task, value)

        def attempt() -> None:
            if not answered and self.up:
                self._send(request, reply)
                self.world.later(self.world.random.uniform(2.0, 5.0), attempt)

        attempt()


class Rank(Process):
    """One training process. ``done`` when it has made all its saves; ``saved`` are those that were acknowledged."""

    def __init__(
        self, world: SimulatedWorld, send: Callable[[Request, Callable[[Reply], None]], None], job: Job, rank: int
    ) -> None:
        super().__init__(world, send)
        self.job = job
        self.rank = rank
        self.run = 0
        self.done = False
        self.stale = False
        self.restored: CheckpointRecord | None = None
        self.saved: list[CheckpointRecord] = []
        self.failed: list[DistckptError] = []
        self._plan: tuple[int, str, bytes] | None = None
        self._origin = ""
        self._restores = 0
        self._saving = 0
        self._under_way: dict[int, tuple[int, float]] = {}
        self._joined: set[int] = set()
        self.start(self._live())
        self.start(self._beat())

    def _live(self) -> Task:
        try:
            yield from self._open()
            self.restored = yield from self._restore()
            first = 1 + (self.restored.number if self.restored is not None else 0)
            order = 0
            for number, chunks in enumerate(self.job.chunks, first):
                if self.job.recovers[number - first] != (self.world.random.random() < self.world.faults.lone_restore):
                    yield from self._recover()
                if self.world.random.random() < self.world.faults.missed_save:
                    continue  # and knows nothing of it
                while self._saving >= self.job.buffers:
                    yield Sleep(0.1)
                order += 1
                yield from self._begin_save(order, number, chunks)
                yield Sleep(self.world.random.uniform(0.2, 2.0))
            while self._saving:
                yield Sleep(0.1)
            self.done = True
            yield from self._ask(Leave())
        except StaleRunError:
            self.stale = True
        except DistckptError as error:
            self.failed.append(error)
            self.done = True

    def _beat(self) -> Task:
        while not self.done and not self.stale:
            yield Sleep(5.0)
            if self.run:
                yield Say(FromRank(self.run, self.rank, Heartbeat()))

    # ---- asking ----------------------------------------------------------------------------------------------------

    def _ask(self, request: RankRequest) -> Generator[Sleep | Say, Reply | None, Reply]:
        """The answer; Unknown after the run was opened again. Raises what the coordinator refuses with."""
        while True:
            reply = yield Say(FromRank(self.run, self.rank, request))
            assert reply is not None
            if isinstance(reply, Unknown):
                yield from self._open()
                return reply
            if isinstance(reply, Late | Lag):
                continue
            if not isinstance(reply, Refused):
                return reply
            if not isinstance(reply.error, FencedError | CoordinatorUnavailableError):
                raise reply.error
            yield Sleep(0.5)

    def _open(self) -> Generator[Sleep | Say, Reply | None, None]:
        job = self.job
        while True:
            reply = yield Say(
                OpenRun(
                    token=job.token,
                    rank=self.rank,
                    world_size=job.world_size,
                    host=f"host-{self.rank}",
                    name="ckpt",
                    retention=job.retention,
                    save_timeout=job.save_timeout,
                    run=self.run,
                    origin=self._origin,
                )
            )
            if isinstance(reply, RunOpened):
                self.run, self._origin = reply.run, reply.origin
                return
            if isinstance(reply, Refused) and not isinstance(reply.error, FencedError | CoordinatorUnavailableError):
                raise reply.error
            yield Sleep(0.5)

    # ---- restoring -------------------------------------------------------------------------------------------------

    def _recover(self) -> Generator[Sleep | Say, Reply | None, None]:
        """In the middle of training, when no save is under way."""
        while self._saving:
            yield Sleep(0.1)
        try:
            yield from self._restore()
        except StaleRunError:
            raise
        except DistckptError as error:
            self.failed.append(error)

    def _restore(self) -> Generator[Sleep | Say, Reply | None, CheckpointRecord | None]:
        self._restores += 1
        first = report = Restore(self._restores, None)
        size, happened = self.job.world_size, self.world.history.add
        while True:
            reply = yield from self._ask(report)
            report = first
            if isinstance(reply, Restored):
                happened(Agreed(self.run, reply.round, self.rank, reply.record))
                return reply.record
            if isinstance(reply, MatchWith):
                refused = yield from self._match(reply)
                report = replace(first, tried=reply.record.attempt, round=reply.round, refused=refused, keys=MATCH)
            elif isinstance(reply, FillFrom):
                happened(Filled(self.run, reply.round, self.rank, reply.record.attempt, size))
                refused = yield from self._read(reply.record)
                if not refused:
                    happened(ReadWhole(self.run, reply.round, self.rank, reply.record.attempt))
                report = replace(first, tried=reply.record.attempt, round=reply.round, refused=refused, stage="fill")
            elif isinstance(reply, FinishWith):
                happened(Finished(self.run, reply.round, self.rank, reply.record.attempt, size))
                report = replace(first, tried=reply.record.attempt, round=reply.round, stage="finish")

    def _match(self, wanted: MatchWith) -> Generator[Sleep | Say, Reply | None, str]:
        yield Sleep(self.world.latency())
        if self.world.random.random() < self.world.faults.failed_read:
            return "its index cannot be read here"
        self.world.history.add(Matched(self.run, wanted.round, self.rank, wanted.record.attempt))
        return ""

    def _read(self, record: CheckpointRecord) -> Generator[Sleep | Say, Reply | None, str]:
        if self.world.random.random() < self.world.faults.failed_read:
            return "cannot be read here"
        shards: dict[str, Content] = {}
        for rank in range(record.world_size):
            yield Sleep(self.world.latency())
            content = self.world.store.get(record.attempt, str(rank))
            if content is None:
                return f"shard of rank {rank} is missing"
            shards[str(rank)] = content
        self.world.history.add(Returned(f"rank {self.rank} of {self.job.token}", record, shards))
        return ""

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _begin_save(self, order: int, number: int, chunks: int) -> Generator[Sleep | Say, Reply | None, None]:
        """Up to the point where training goes on: agree on a plan unless the last one still serves, and copy."""
        joined = None
        self._under_way[order] = (number, self.world.time)
        try:
            if self.job.skip_if_busy or self._plan is None or self._plan[0] != chunks:
                joined = yield from self._agree(order, number, chunks)
                if joined is None:
                    del self._under_way[order]
                    return
        except StaleRunError:
            raise
        except DistckptError as error:
            del self._under_way[order]
            self.failed.append(error)
            return
        assert self._plan is not None
        self._saving += 1
        self.start(self._finish_save(order, number, self._plan, joined))

    def _agree(self, order: int, number: int, chunks: int) -> Generator[Sleep | Say, Reply | None, Joined | None]:
        while True:
            joined = yield from self._join(order, number, chunks)
            if isinstance(joined, Skipped):
                return None
            if not isinstance(joined, Joined):
                raise SaveError(number, f"unexpected answer {joined}")
            attempt = joined.attempt
            if joined.describe:
                told = yield from self._describe(attempt, chunks, None)
                if not told:
                    continue
            reply = yield from self._ask(AwaitPlan(attempt))
            if isinstance(reply, Planned):
                self._plan = (chunks, reply.plan, reply.rows)
                return joined

    def _finish_save(self, order: int, number: int, plan: tuple[int, str, bytes], joined: Joined | None) -> Task:
        try:
            record = yield from self._drive(order, number, plan, joined)
            self.saved.append(record)
        except StaleRunError:
            self.stale = True
        except DistckptError as error:
            self.failed.append(error)
        self._saving -= 1
        del self._under_way[order]

    def _drive(
        self, order: int, number: int, plan: tuple[int, str, bytes], joined: Joined | None
    ) -> Generator[Sleep | Say, Reply | None, CheckpointRecord]:
        chunks, plan_id, rows = plan
        attempt, written = "", set[str]()
        while True:
            if joined is None:
                reply = yield from self._join(order, number, chunks, plan_id, attempt)
                if isinstance(reply, Committed):
                    return reply.record
                if not isinstance(reply, Joined):
                    raise SaveError(number, f"unexpected answer {reply}")
                joined = reply
                if joined.describe:
                    told = yield from self._describe(joined.attempt, chunks, rows)
                    if not told:
                        joined = None
                        continue
            attempt = joined.attempt
            if attempt not in written:
                yield from self._write(attempt, order, number, chunks, rows)
                written.add(attempt)
            shard = ShardReceipt(0, len(rows), 0, len(rows) // 4, b"", b"", b"", b"")
            reply = yield from self._ask(Receipt(attempt, (shard,)))
            if isinstance(reply, Committed):
                return reply.record
            joined = None

    def _join(
        self, order: int, number: int, chunks: int, plan: str = "", attempt: str = ""
    ) -> Generator[Sleep | Say, Reply | None, Reply]:
        skip = self.job.skip_if_busy
        while any(other < order and other not in self._joined for other in self._under_way):
            yield Sleep(0.1)
        age = self.world.time - self._under_way[order][1]
        while True:
            earlier = tuple((other, of) for other, (of, _) in sorted(self._under_way.items()) if other < order)
            reply = yield from self._ask(
                Join(order, number, str(chunks), plan, plan != "", attempt, skip, earlier, age)
            )
            if not isinstance(reply, Unknown):
                self._joined.add(order)
                return reply

    def _describe(self, attempt: str, chunks: int, rows: bytes | None) -> Generator[Sleep | Say, Reply | None, bool]:
        reply = yield from self._ask(Describe(attempt, str(chunks), describe(chunks), rows))
        return not isinstance(reply, Unknown)

    def _write(
        self, attempt: str, order: int, number: int, chunks: int, rows: bytes
    ) -> Generator[Sleep | Say, Reply | None, None]:
        yield Sleep(self.world.latency() * 5)
        if self.world.random.random() < self.world.faults.full_disk:
            yield from self._ask(MakeRoom())
        if self.world.random.random() < self.world.faults.failed_rank:
            yield from self._ask(Fail(attempt, "disk full"))
            raise SaveError(number, "disk full")
        piece = Piece(self.run, order, number, self.rank, rows, chunks)
        store = self.world.store
        store.put(attempt, str(self.rank), piece, self.world.time)
        self.world.again(lambda: store.put_if_absent(attempt, str(self.rank), piece, self.world.time))
