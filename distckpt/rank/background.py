"""What happens to a save while training goes on: it is written, reported, and waited for until it is committed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

from distckpt.coordinator.messages import Committed, Joined, Reply, Unknown
from distckpt.directory.newest import committed_after_all
from distckpt.errors import (
    CoordinatorFailedError,
    CoordinatorUnavailableError,
    DistckptError,
    SaveError,
    StorageFullError,
    ranks_at_hosts,
)
from distckpt.format import names
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.rank.dialogue import Dialogue
from distckpt.rank.layout import Layout
from distckpt.rank.options import SaverOptions
from distckpt.rank.pending import Progress
from distckpt.storage import Store, cool, join
from distckpt.terminal.bar import bar
from distckpt.terminal.sizes import counted, human_bytes
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread
from distckpt.transfer.progress import Meter
from distckpt.transfer.staging import Staging
from distckpt.transfer.writer import read_back, write_shard

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SaveTask:
    """One save on its way to the commit. ``joined`` is None until this rank has joined it."""

    order: int
    number: int
    layout: Layout
    staging: Staging
    describe: Callable[[], bytes] = field(repr=False)
    joined: Joined | None
    progress: Progress
    metrics: Mapping[str, float]
    written: dict[str, tuple[ShardReceipt, ...]] = field(default_factory=dict)
    attempt: str = ""


class Background:
    """Brings saves to their end, one a thread, in threads of ``threads``; as many as the rank has buffers."""

    def __init__(self, store: Store, dialogue: Dialogue, options: SaverOptions, threads: Coordinator) -> None:
        self._store = store
        self._dialogue = dialogue
        self._options = options
        self._threads = threads
        self._tasks: SimpleQueue[SaveTask | None] = SimpleQueue()
        self._newest = _Newest(store)
        self._shown = options.shown and options.rank == 0
        for at in range(options.buffers):
            LooperThread.loop(threads, None, self._work, name=f"distckpt-save-{at}")

    def put(self, task: SaveTask) -> None:
        """Have ``task``, whose state has been copied, brought to its end."""
        if self._threads.should_stop():  # they have ended: by an error, for nobody saves after ``stop``
            self._threads.raise_requested_exception()
        self._tasks.put(task)

    def stop(self) -> None:
        """End the threads. To be called when no save is under way: one that waits for its turn would not end."""
        self._threads.request_stop()
        for _ in range(self._options.buffers):
            self._tasks.put(None)

    def _work(self) -> None:
        """Bring one save to its end, or wake up to see that there will be no more."""
        task = None
        try:
            task = self._tasks.get()
            # The call that began it may have given it up.
            if task is not None and task.progress.turn.acquire(blocking=False):
                self._bring(task)
        except BaseException as error:  # it belongs to whoever holds the PendingSave, and must not end the thread
            logger.debug("a save has failed", exc_info=error)
            if task is not None:
                task.progress.fail(error)
                self._dialogue.over(
                    task.order
                )  # as ``ended`` has it said too, which tells nobody what goes wrong there

    def _bring(self, task: SaveTask) -> None:
        committed = self._drive(task)
        self._tell(task, committed)
        task.progress.commit(committed.record, committed.last)
        attempt = committed.record.attempt
        self._newest.is_now(attempt, [self._path(task, attempt, at) for at in self._shards(task)])

    def _tell(self, task: SaveTask, committed: Committed) -> None:
        """What has come of the save, in the log of rank 0."""
        if self._options.rank == 0:
            saved = self._shown_path(task)
            logger.info("%s", _summary(saved, task.progress, committed))
            for retired in (join(self._store.url, folder) for folder in committed.retired):
                if retired == saved:
                    logger.info("the former %s retired", retired)
                else:
                    logger.info("%s retired, to make room", retired)

    def _shown_path(self, task: SaveTask) -> str:
        return join(self._store.url, names.checkpoint_folder(self._options.name, task.number))

    def _drive(self, task: SaveTask) -> Committed:
        """Join, write, report, until the coordinator says that it is committed. A new coordinator starts it over."""
        while True:
            try:
                reply = self._once(task)
            except (CoordinatorUnavailableError, CoordinatorFailedError):
                record = committed_after_all(self._store, task.attempt) if task.attempt else None
                if record is None:
                    raise
                return Committed(record)
            if isinstance(reply, Committed):
                return reply
            if not isinstance(reply, Unknown):
                raise SaveError(task.number, f"unexpected answer from the coordinator: {reply!r}")
            task.joined = None

    def _once(self, task: SaveTask) -> Reply:
        layout = task.layout
        if task.joined is None:
            reply = self._dialogue.join(task.order, task.number, layout.digest, True, layout.plan, task.attempt)
            if not isinstance(reply, Joined):
                return reply
            task.joined = reply
            if reply.describe and not self._dialogue.describe(
                reply, layout.digest, task.describe(), layout.encoded_rows()
            ):
                return Unknown()
        task.attempt = task.joined.attempt
        return self._dialogue.report(task.attempt, self._write(task, task.attempt), task.metrics)

    def _write(self, task: SaveTask, attempt: str) -> tuple[ShardReceipt, ...]:
        if attempt not in task.written:
            try:
                task.written[attempt] = self._write_shards(task, attempt)
                task.progress.written = task.progress.seconds()
                task.progress.nbytes = sum(receipt.size for receipt in task.written[attempt])
            except Exception as error:
                self._report_failure(attempt, error)
                raise
        return task.written[attempt]

    def _write_shards(self, task: SaveTask, attempt: str) -> tuple[ShardReceipt, ...]:
        shown, self._shown = self._shown, False
        with bar(f"saving {names.checkpoint_folder(self._options.name, task.number)}", shown) as update:
            meter = Meter(sum(shard.image.size for shard in task.staging.shards), update)
            return tuple(self._write_shard(task, attempt, at, meter) for at in self._shards(task))

    def _shards(self, task: SaveTask) -> range:
        return range(len(task.staging.shards))

    def _path(self, task: SaveTask, attempt: str, shard: int) -> str:
        folder = names.attempt_folder(self._options.name, task.number, attempt)
        return f"{folder}/{names.shard_name(self._options.rank, shard)}"

    def _write_shard(self, task: SaveTask, attempt: str, shard: int, meter: Meter) -> ShardReceipt:
        path = self._path(task, attempt, shard)
        try:
            receipt = write_shard(self._store, path, task.staging.shards[shard], wrote=meter.add)
        except StorageFullError as error:
            logger.warning("%s; it is tried again once room has been made", error)
            self._dialogue.make_room()
            receipt = write_shard(self._store, path, task.staging.shards[shard], wrote=meter.add)
        if self._options.verify:
            read_back(self._store, path, receipt)
        return receipt

    def _report_failure(self, attempt: str, error: Exception) -> None:
        try:
            self._dialogue.fail(attempt, f"{type(error).__name__}: {error}")
        except DistckptError as refusal:
            # The usual answer is the failure itself, sent back; anything else the original error explains better.
            logger.debug("reporting the failure of this rank was answered with: %s", refusal)


def _summary(path: str, progress: Progress, committed: Committed) -> str:
    record, last = committed.record, committed.last
    parts = [
        f"{human_bytes(record.nbytes)} of {counted(record.world_size, 'rank')}",
        f"training stood still for {progress.stall:.3f} s",
        f"written after {progress.written or 0.0:.2f} s and committed after {progress.seconds():.2f} s",
    ]
    if last is not None and record.world_size > 1:
        parts.append(
            f"last was {ranks_at_hosts([last.rank], {last.rank: last.host})}, {last.seconds:.2f} s behind the first"
        )
    return f"{path} saved: {'; '.join(parts)}"


class _Newest:
    """Has the host's memory keep the files of the newest checkpoint alone, of those that this rank has written.

    Whoever starts again after a crash restores that one.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._attempt = ""
        self._paths: list[str] = []

    def is_now(self, attempt: str, paths: list[str]) -> None:
        """It is committed, and this rank has written these files for it."""
        with self._lock:
            if names.attempt_age(attempt) < names.attempt_age(self._attempt or attempt):
                before = paths
            else:
                before, self._paths, self._attempt = self._paths, paths, attempt
        for path in before:
            cool(self._store, path)
