"""Reading stored bytes straight to where they are wanted, every one of them checked before it counts as read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import crc32c
import numpy as np

from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format.arrow.index import Index
from distckpt.format.names import shard_name
from distckpt.sharding.match import Transfers
from distckpt.storage.around import cool
from distckpt.storage.interface import Source, Store
from distckpt.storage.node import ranks_here
from distckpt.storage.split import has_far_shards, place_of
from distckpt.transfer.progress import Meter, Progress
from distckpt.transfer.read_plan import Batch, Read, Scatter, plan_reads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadStats:
    """``bytes_needed`` were asked for, ``bytes_read`` came from the store (whole blocks), in ``seconds``."""

    bytes_needed: int
    bytes_read: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How to ask a store for bytes.

    ``piece``: bytes of one request. Reads of up to ``small`` bytes that lie within ``gap`` bytes of each other are
    asked for together. ``batch``: about what one thread does in one go. ``threads`` is the least number of threads.
    """

    piece: int
    small: int
    gap: int
    batch: int
    threads: int


LOCAL = Pace(piece=2 << 20, small=64 << 10, gap=4 << 10, batch=16 << 20, threads=1)
"""For files: a piece stays in the processor's cache until its CRC is taken, and a request costs microseconds."""

REMOTE = Pace(piece=8 << 20, small=1 << 20, gap=256 << 10, batch=16 << 20, threads=16)
"""For object stores: a request costs tens of milliseconds, and many at a time cost no more."""


ShardName = Callable[[int, int], str]
"""The file name of a shard, by rank and number."""


def pace_of(store: Store) -> Pace:
    """How to ask that store for what is in shards: REMOTE if the root of where they are is a URL."""
    return REMOTE if has_far_shards(store) else LOCAL


def default_threads() -> int:
    """The processors that this process may use, shared with the other ranks of its host."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // ranks_here())


def read_transfers(
    store: Store,
    folder: str,
    index: Index,
    transfers: Transfers,
    targets: Sequence[memoryview],
    threads: int | None = None,
    pace: Pace | None = None,
    progress: Progress | None = None,
    name: ShardName = shard_name,
) -> ReadStats:
    """Carry out the transfers: on return every byte of them is in place, and has been checked against its CRC32C.

    ``folder`` is that of the attempt, relative to the root of ``store``, and ``name`` names the shards in it by rank and
    number. What the index has no CRCs of is read as it is. ``targets`` has for each wanted rectangle its
    memory: writable, contiguous, exactly as many bytes as it takes. ``progress`` is told of the bytes read. Raises
    DamagedError, naming shard and key, if a shard is missing, too short or not what was written; StorageError if the
    store fails. After an error the targets hold anything. ValueError if a wanted rectangle is not covered, or its
    memory does not fit.
    """
    return _carry_out(store, folder, index, transfers, _views(transfers, targets), threads, pace, progress, name)


def check_transfers(
    store: Store,
    folder: str,
    index: Index,
    transfers: Transfers,
    progress: Progress | None = None,
    name: ShardName = shard_name,
) -> ReadStats:
    """Read the bytes that ``read_transfers`` would read and check them, and put them nowhere. Raises what that raises."""
    return _carry_out(store, folder, index, transfers, None, None, None, progress, name)


def _carry_out(
    store: Store,
    folder: str,
    index: Index,
    transfers: Transfers,
    views: list[memoryview] | None,
    threads: int | None,
    pace: Pace | None,
    progress: Progress | None,
    name: ShardName,
) -> ReadStats:
    began = time.perf_counter()
    pace = pace or pace_of(store)
    workers = max(threads, 1) if threads is not None else max(default_threads(), pace.threads)
    total = int(transfers.nbytes.sum())
    # Several batches for each thread, so that none waits long for the last; for one thread there is nothing to share.
    batch_bytes = max(pace.piece, min(pace.batch, total // (4 * workers))) if workers > 1 else 1 << 62
    batches = plan_reads(index, transfers, batch_bytes)
    planned = sum(read.end - read.begin for batch in batches for read in batch.reads) if progress is not None else 0
    job = _Job(_Shards(store, folder, batches, name), index, views, pace, deque(batches), Meter(planned, progress))
    try:
        bytes_read = _run(job, min(workers, len(batches)))
    finally:
        job.shards.close()
    return ReadStats(total, bytes_read, time.perf_counter() - began)


def _views(transfers: Transfers, targets: Sequence[memoryview]) -> list[memoryview]:
    if transfers.uncovered:
        raise ValueError(f"the checkpoint does not cover what is wanted of {transfers.keys[transfers.uncovered[0]]!r}")
    views = [memoryview(target) for target in targets]
    if not all(view.format == "B" and view.ndim == 1 and view.contiguous and not view.readonly for view in views):
        raise ValueError("the memory of a wanted rectangle must be writable and contiguous, as bytes")
    if [view.nbytes for view in views] != transfers.wanted_nbytes.tolist():
        raise ValueError("the memory of a wanted rectangle is not as large as the rectangle")
    return views


@dataclass(frozen=True, slots=True)
class _Job:
    """What all threads share: they take batches from the left until there are none. Without ``views`` they only check."""

    shards: _Shards
    index: Index
    views: list[memoryview] | None
    pace: Pace
    batches: deque[Batch]
    meter: Meter

    def work(self) -> int:
        """Do batches until none is left; bytes read. An error leaves none for the other threads."""
        bytes_read = 0
        scratch = _Scratch()
        try:
            while (batch := self._next()) is not None:
                bytes_read += self._do(batch, scratch)
        except BaseException:
            self.batches.clear()
            raise
        return bytes_read

    def _next(self) -> Batch | None:
        try:
            return self.batches.popleft()
        except IndexError:
            return None

    def _do(self, batch: Batch, scratch: _Scratch) -> int:
        path = self.shards.path(batch)
        try:
            with self.shards.open(batch) as source:
                reader = _Reader(self, source, path, scratch)
                for run in _runs(batch.reads, self.pace):
                    try:
                        reader.read(run)
                    except DamagedError:
                        reader.bytes_read += self._again(batch, run, scratch)
        except ObjectNotFoundError as error:
            raise DamagedError(path, "the shard is missing", self.key(batch.reads[0])) from error
        except DamagedError as error:
            raise DamagedError(path, error.reason, error.key or self.key(batch.reads[0])) from error
        return reader.bytes_read

    def _again(self, batch: Batch, run: list[Read], scratch: _Scratch) -> int:
        """Read once more what seems to be damaged, from the shard opened anew: one reading proves nothing."""
        with closing(self.shards.anew(batch)) as source:
            reader = _Reader(self, source, self.shards.path(batch), scratch)
            for read in run:
                reader.alone(read)
        logger.warning("%s: one reading was damaged and the next was not, which counts", self.shards.path(batch))
        return reader.bytes_read

    def key(self, read: Read) -> str:
        """Which tensor or value the read is of."""
        return self.index.names[int(self.index.key[read.row])]


def _run(job: _Job, workers: int) -> int:
    if workers <= 1:
        return job.work()
    with ThreadPoolExecutor(workers, thread_name_prefix="distckpt-read") as pool:
        try:
            return sum(done.result() for done in [pool.submit(job.work) for _ in range(workers)])
        finally:
            job.batches.clear()


class _Shards:
    """The shards of the batches, each opened once, by the first thread that needs it, and closed after its last."""

    def __init__(self, store: Store, folder: str, batches: Sequence[Batch], name: ShardName) -> None:
        self._store = store
        self._folder = folder
        self._name = name
        self._left = Counter((batch.rank, batch.shard) for batch in batches)
        self._open: dict[tuple[int, int], Source] = {}
        self._locks = {shard: threading.Lock() for shard in self._left}

    def path(self, batch: Batch) -> str:
        """The batch's shard, as people see it."""
        return place_of(self._store, self._relative(batch))

    def _relative(self, batch: Batch) -> str:
        return "/".join(filter(None, (self._folder, self._name(batch.rank, batch.shard))))

    @contextmanager
    def open(self, batch: Batch) -> Iterator[Source]:
        """The batch's shard, open for as long as any batch of it is left."""
        shard = (batch.rank, batch.shard)
        with self._locks[shard]:
            if shard not in self._open:
                self._open[shard] = self._store.open(self._relative(batch))
            source = self._open[shard]
        try:
            yield source
        finally:
            with self._locks[shard]:
                self._left[shard] -= 1
                if not self._left[shard]:
                    self._open.pop(shard).close()

    def anew(self, batch: Batch) -> Source:
        """The batch's shard, opened once more to read what is stored, for the caller to close."""
        cool(self._store, self._relative(batch))
        return self._store.open(self._relative(batch))

    def close(self) -> None:
        """Close what an error left open. Only when no thread is at work."""
        while self._open:
            self._open.popitem()[1].close()


# ---- one thread at work ---------------------------------------------------------------------------------------------


class _Scratch:
    """Memory of one thread for bytes that are not read to their place directly; grows to what is asked for."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(0))

    def take(self, size: int) -> memoryview:
        """``size`` bytes, holding anything, until the next call."""
        if self._memory.nbytes < size:
            self._memory = np.empty(max(size, 1 << 20), dtype=np.uint8).data
        return self._memory[:size]


def _runs(reads: Sequence[Read], pace: Pace) -> Iterator[list[Read]]:
    """Small neighbours together, everything else alone."""
    run: list[Read] = []
    begin = end = 0
    for read in reads:
        small = read.end - read.begin <= pace.small
        if run and not (small and read.begin - end <= pace.gap and read.end - begin <= pace.piece):
            yield run
            run = []
        if not small:
            yield [read]
            continue
        if not run:
            begin = end = read.begin
        run.append(read)
        end = max(end, read.end)
    if run:
        yield run


class _Reader:
    """Reads from one open shard."""

    def __init__(self, job: _Job, source: Source, path: str, scratch: _Scratch) -> None:
        self._job = job
        self._source = source
        self._path = path
        self._scratch = scratch
        self._piece = job.pace.piece
        self._crc: Callable[[memoryview, int], int] = crc32c.crc32c if job.index.has_sums else _no_crc
        self.bytes_read = 0

    def read(self, run: list[Read]) -> None:
        """Read, check and put in place. DamagedError with the key."""
        if len(run) == 1:
            self.alone(run[0])
            return
        begin, end = run[0].begin, max(read.end for read in run)
        buffer = self._scratch.take(end - begin)
        try:
            self._fill(begin, buffer)
        except DamagedError:
            # The shard ends too early: one at a time, to find the key that is hurt.
            for read in run:
                self.alone(read)
            return
        for read in run:
            self._check(read, self._crc(buffer[read.begin - begin : read.end - begin], read.before))
            if self._job.views is not None:
                self._put(read, self._job.views[read.wanted], buffer, begin)

    def alone(self, read: Read) -> None:
        """As ``read``, for one that is not put together with others."""
        try:
            if self._job.views is None:
                crc = self._pass_over(read.begin, read.end, read.before)
            else:
                crc = self._to_its_place(read, self._job.views[read.wanted])
        except DamagedError as error:
            raise DamagedError(self._path, error.reason, self._job.key(read)) from error
        self._check(read, crc)

    def _to_its_place(self, read: Read, view: memoryview) -> int:
        crc = self._pass_over(read.begin, read.keep, read.before)
        if read.scatter is None:
            crc = self._stream(read.keep, view[read.target : read.target + read.keep_end - read.keep], crc)
        else:
            _, crc = self._scattered(read.scatter, read.keep, (view, read.target), read.keep, crc)
        return self._pass_over(read.keep_end, read.end, crc)

    def _check(self, read: Read, crc: int) -> None:
        if crc != read.after and self._job.index.has_sums:
            reason = f"bytes {read.begin} to {read.end}: CRC32C is {crc:08x} and should be {read.after:08x}"
            raise DamagedError(self._path, reason, self._job.key(read))

    def _fill(self, position: int, target: memoryview) -> None:
        self._source.read_into(position, target)
        self.bytes_read += target.nbytes
        self._job.meter.add(target.nbytes)

    def _stream(self, position: int, target: memoryview, crc: int) -> int:
        """Fill ``target``, a piece at a time, and carry the CRC on while the piece is still in the cache."""
        for first in range(0, target.nbytes, self._piece):
            piece = target[first : first + self._piece]
            self._fill(position + first, piece)
            crc = self._crc(piece, crc)
        return crc

    def _pass_over(self, position: int, end: int, crc: int) -> int:
        """Bytes that nobody wants but that belong to the block."""
        while position < end:
            piece = self._scratch.take(min(self._piece, end - position))
            crc = self._stream(position, piece, crc)
            position += piece.nbytes
        return crc

    def _put(self, read: Read, view: memoryview, buffer: memoryview, begin: int) -> None:
        """Copy what is wanted out of ``buffer``, which holds the shard from ``begin`` on."""
        if read.scatter is None:
            size = read.keep_end - read.keep
            view[read.target : read.target + size] = buffer[read.keep - begin : read.keep_end - begin]
        else:
            _copy(read.scatter, read.scatter.shape[0], buffer, read.keep - begin, view, read.target)

    def _scattered(
        self, scatter: Scatter, source: int, target: tuple[memoryview, int], done: int, crc: int
    ) -> tuple[int, int]:
        """Through scratch memory, a few steps at a time, from byte ``done`` of the shard on; how far, and its CRC.

        ``source`` is where the first element is in the shard, ``target`` the memory and where it goes there.
        """
        step, target_step = scatter.source_strides[0], scatter.target_strides[0]
        if step > self._piece and max(scatter.shape[1:], default=1) > 1:
            inner = scatter.inner()
            for number in range(scatter.shape[0]):
                place = (target[0], target[1] + number * target_step)
                done, crc = self._scattered(inner, source + number * step, place, done, crc)
            return done, crc
        at_once = max(1, self._piece // step)
        for first in range(0, scatter.shape[0], at_once):
            count, start = min(at_once, scatter.shape[0] - first), source + first * step
            if start - done > self._piece:
                done, crc = start, self._pass_over(done, start, crc)
            buffer = self._scratch.take(start + scatter.reach(count) - done)
            crc = self._stream(done, buffer, crc)
            _copy(scatter, count, buffer, start - done, target[0], target[1] + first * target_step)
            done += buffer.nbytes
        return done, crc


def _no_crc(piece: memoryview, crc: int) -> int:
    return crc


def _copy(scatter: Scatter, count: int, source: memoryview, start: int, target: memoryview, place: int) -> None:
    kind = np.dtype((np.void, scatter.item))
    shape = (count, *scatter.shape[1:])
    taken = np.ndarray(shape, kind, source, start, scatter.source_strides)
    np.ndarray(shape, kind, target, place, scatter.target_strides)[...] = taken
