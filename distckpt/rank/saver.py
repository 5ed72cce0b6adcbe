"""One rank's side of a save: collect, stage, and in the background write, report and wait for the commit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import (
    AwaitPlan,
    Committed,
    Describe,
    Fail,
    Join,
    Joined,
    Planned,
    RankRequest,
    Receipt,
    Reply,
    Skipped,
    Unknown,
)
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorUnavailableError, DistckptError, SaveError
from distckpt.format import names
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.arrow.shard import Chunk
from distckpt.format.json.log import CheckpointRecord
from distckpt.rank.pending import PendingSave
from distckpt.rank.step_order import StepOrder
from distckpt.state.collector import Collector, Holding
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread
from distckpt.transfer.staging import MAX_SHARD_BYTES, StagedCopy, Staging
from distckpt.transfer.writer import read_back, write_shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """What this rank writes under one plan: rows of its description, and the chunks that they are."""

    digest: str
    plan: str
    rows: tuple[int, ...]
    tensor_rows: tuple[int, ...]
    value_rows: tuple[int, ...]


@dataclass(slots=True)
class _Buffer:
    """A staging buffer and the save that is using it."""

    layout: Layout | None = None
    staging: Staging | None = None
    pending: PendingSave | None = None


@dataclass(slots=True)
class _Task:
    """One save on its way through the background thread."""

    ask: int
    number: int
    layout: Layout
    staging: Staging
    description: Callable[[], bytes] = field(repr=False)
    joined: Joined | None
    staged: Future[StagedCopy] = field(default_factory=Future, repr=False)
    written: dict[str, tuple[ShardReceipt, ...]] = field(default_factory=dict)
    attempt: str = ""


class Saver:
    """Stages and writes this rank's part of every save. Used from one thread, the training loop's.

    What is done in the background is done in threads of ``background``, one a buffer.
    """

    def __init__(
        self,
        background: Coordinator,
        session: Client,
        store: Store,
        collector: Collector,
        rank: int,
        name: str,
        save_timeout: float,
        buffers: int,
        skip_if_busy: bool,
        verify: bool,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self._order = StepOrder(optimizers)
        self._session = session
        self._store = store
        self._collector = collector
        self._rank = rank
        self._name = name
        self._timeout = save_timeout
        self._skip_if_busy = skip_if_busy
        self._verify = verify
        self._buffers = [_Buffer() for _ in range(buffers)]
        self._asked = 0
        self._layout: Layout | None = None
        self._background = background
        self._tasks: SimpleQueue[tuple[_Task, PendingSave] | None] = SimpleQueue()
        for at in range(buffers):
            LooperThread.loop(background, None, self._work, name=f"distckpt-save-{at}")

    def prepare(self) -> None:
        """Make the plan with all ranks and touch the memory of every buffer, so that the first save is like the rest.

        Raises what a save would raise: EncodeError, PlanError, MissingRanksError ...
        """
        ask = self._next_ask()
        holding = self._collect(ask, None)
        planned = self._plan(ask, None, holding)
        if planned is None:
            raise SaveError(None, "a prepare cannot be skipped")
        self._layout = planned[0]
        for buffer in self._buffers:
            self._settle(buffer)
            self._fit(buffer, self._layout, holding)

    def save(self, number: int, path: str) -> PendingSave | None:
        """Copy the state and write it in the background. None if all ranks skip because a save is in flight.

        Raises EncodeError at once; everything that concerns other ranks or storage is in the PendingSave.
        """
        ask = self._next_ask()
        holding = self._collect(ask, number)
        pending = PendingSave(path, number)
        joined = None
        try:
            # A warm layout asks nobody. To skip is a decision of all ranks, so that mode asks every time.
            if self._skip_if_busy or self._layout is None or self._layout.digest != holding.description.digest:
                planned = self._plan(ask, number, holding)
                if planned is None:
                    return None
                self._layout, joined = planned
            buffer = self._free_buffer()
            self._fit(buffer, self._layout, holding)
        except DistckptError as error:
            pending._future.set_exception(error)
            return pending
        except Exception as error:  # no memory, say
            self._give_up(ask, number, f"{type(error).__name__}: {error}")
            raise
        staging = self._staging_of(buffer)
        task = _Task(ask, number, self._layout, staging, holding.describe, joined)
        try:
            self._tasks.put((task, pending))
            buffer.pending = pending
            pending._staged = self._order.after(staging, *_contents(task.layout, holding))
            task.staged.set_result(pending._staged)
        except BaseException as error:
            # Ctrl-C too, or the background thread would wait for this copy for ever.
            task.staged.set_exception(SaveError(number, f"its copy was given up: {type(error).__name__}: {error}"))
            raise
        return pending

    def close(self) -> None:
        """Wait for what is under way, stop the threads and let the memory go."""
        self._order.close()
        for buffer in self._buffers:
            self._settle(buffer)
        self._background.request_stop()
        for buffer in self._buffers:
            self._tasks.put(None)
            if buffer.staging is not None:
                buffer.staging.close()
                buffer.staging = None

    # ---- before the training loop goes on ----------------------------------------------------------------------

    def _next_ask(self) -> int:
        self._asked += 1
        return self._asked

    def _free_buffer(self) -> _Buffer:
        for buffer in self._buffers:
            if buffer.pending is None or buffer.pending.done():
                return buffer
        oldest = min(self._buffers, key=lambda buffer: buffer.pending.number if buffer.pending else -1)
        self._settle(oldest)
        return oldest

    def _settle(self, buffer: _Buffer) -> None:
        if buffer.pending is not None:
            buffer.pending._settle()

    def _collect(self, ask: int, number: int | None) -> Holding:
        try:
            return self._collector.collect()
        except Exception as error:
            self._give_up(ask, number, str(error) if isinstance(error, DistckptError) else repr(error))
            raise

    def _give_up(self, ask: int, number: int | None, reason: str) -> None:
        """Tell the others, who would otherwise wait for us until the deadline."""
        try:
            reply = self._join(ask, number, "", staged=False)
            if isinstance(reply, Joined):
                self._ask(Fail(reply.attempt, reason))
        except DistckptError as error:
            logger.warning("the other ranks could not be told that this save fails: %s", error)

    def _plan(self, ask: int, number: int | None, holding: Holding) -> tuple[Layout, Joined] | None:
        """Agree with all ranks on who writes what; None if all of them skip this save."""
        digest = holding.description.digest
        while True:
            joined = self._join(ask, number, digest, staged=False)
            if isinstance(joined, Skipped):
                return None
            if not isinstance(joined, Joined):
                raise SaveError(number, f"unexpected answer to Join: {joined!r}")
            if joined.describe and not self._describe(joined, digest, holding.describe(), None):
                continue
            attempt = joined.attempt
            reply = self._ask(AwaitPlan(attempt))
            if isinstance(reply, Planned):
                return _layout(digest, reply, holding), joined

    def _join(
        self, ask: int, number: int | None, digest: str, staged: bool, plan: str = "", attempt: str = ""
    ) -> Reply:
        while True:
            reply = self._ask(
                Join(
                    ask,
                    number,
                    digest,
                    plan,
                    staged,
                    attempt,
                    len(self._buffers) if self._skip_if_busy and number is not None else 0,
                )
            )
            if not isinstance(reply, Unknown):
                return reply

    def _describe(self, joined: Joined, digest: str, description: bytes, staged: bytes | None) -> bool:
        reply = self._ask(Describe(joined.attempt, digest, description, staged))
        return not isinstance(reply, Unknown)

    def _ask(self, request: RankRequest) -> Reply:
        # The coordinator itself answers at the save's deadline; twice that means that it does not answer at all.
        return self._session.ask(request, 2 * self._timeout + 60)

    def _fit(self, buffer: _Buffer, layout: Layout, holding: Holding) -> None:
        values = [holding.values[row] or b"" for row in layout.value_rows]
        if buffer.layout == layout and buffer.staging is not None and buffer.staging.fits(values):
            return
        if buffer.staging is not None:
            buffer.staging.close()
            buffer.staging = None
        chunks = [_chunk(holding, row) for row in layout.rows]
        buffer.staging = Staging(chunks, values, MAX_SHARD_BYTES)
        buffer.layout = layout

    def _staging_of(self, buffer: _Buffer) -> Staging:
        if buffer.staging is None:
            raise SaveError(None, "the staging buffer was closed")
        return buffer.staging

    # ---- in the background -------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Bring one save to its end, or wake up to see that there will be no more."""
        work = self._tasks.get()
        if work is not None:
            self._run(*work)

    def _run(self, task: _Task, pending: PendingSave) -> None:
        try:
            record = self._drive(task)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever holds the PendingSave, whatever it is
            pending._future.set_exception(error)
        else:
            pending._future.set_result(record)

    def _drive(self, task: _Task) -> CheckpointRecord:
        """Join, write, report, until the coordinator says that it is committed. A new coordinator starts it over."""
        wait([task.staged])  # training waits for the copy, which needs the processors more than the joining does
        while True:
            try:
                reply = self._once(task)
            except CoordinatorUnavailableError:
                record = self._committed(task.attempt)
                if record is None:
                    raise
                return record
            if isinstance(reply, Committed):
                return reply.record
            if not isinstance(reply, Unknown):
                raise SaveError(task.number, f"unexpected answer from the coordinator: {reply!r}")
            task.joined = None

    def _once(self, task: _Task) -> Reply:
        layout = task.layout
        if task.joined is None:
            reply = self._join(task.ask, task.number, layout.digest, True, layout.plan, task.attempt)
            if not isinstance(reply, Joined):
                return reply
            task.joined = reply
            if reply.describe and not self._describe(
                reply, layout.digest, task.description(), _rows_bytes(layout.rows)
            ):
                return Unknown()
        attempt = task.attempt = task.joined.attempt
        shards = self._write(task, attempt)
        return self._ask(Receipt(attempt, shards))

    def _write(self, task: _Task, attempt: str) -> tuple[ShardReceipt, ...]:
        if attempt not in task.written:
            try:
                task.staged.result()
                task.written[attempt] = tuple(
                    self._write_shard(task, attempt, shard) for shard in range(len(task.staging.shards))
                )
            except Exception as error:
                self._report_failure(attempt, error)
                raise
        return task.written[attempt]

    def _write_shard(self, task: _Task, attempt: str, shard: int) -> ShardReceipt:
        folder = names.attempt_folder(self._name, task.number, attempt)
        path = f"{folder}/{names.shard_name(self._rank, shard)}"
        receipt = write_shard(self._store, path, task.staging.shards[shard])
        if self._verify:
            read_back(self._store, path, receipt)
        return receipt

    def _report_failure(self, attempt: str, error: Exception) -> None:
        try:
            self._ask(Fail(attempt, f"{type(error).__name__}: {error}"))
        except DistckptError as refusal:
            # The usual answer is the failure itself, sent back; anything else the original error explains better.
            logger.debug("reporting the failure of this rank was answered with: %s", refusal)

    def _committed(self, attempt: str) -> CheckpointRecord | None:
        """Storage is the truth when the coordinator is gone: was our attempt committed before it went?"""
        return read_tail(self._store).state.find(attempt)


def _layout(digest: str, planned: Planned, holding: Holding) -> Layout:
    rows = tuple(np.frombuffer(planned.rows, dtype="<i4").tolist())
    tensors = tuple(row for row in rows if holding.sources[row] is not None)
    values = tuple(row for row in rows if holding.values[row] is not None)
    return Layout(digest, planned.plan, rows, tensors, values)


def _contents(layout: Layout, holding: Holding) -> tuple[list[torch.Tensor], list[bytes]]:
    sources = [source for row in layout.tensor_rows if (source := holding.sources[row]) is not None]
    return sources, [holding.values[row] or b"" for row in layout.value_rows]


def _chunk(holding: Holding, row: int) -> Chunk:
    held = holding.rows[row]
    return Chunk(held.key, held.dtype, held.shape, held.offset, held.length, held.nbytes)


def _rows_bytes(rows: Sequence[int]) -> bytes:
    return np.asarray(rows, dtype="<i4").tobytes()
