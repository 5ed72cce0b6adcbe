"""``distckpt cp``: checkpoints from one directory to another, on whatever stores, committed there through the log."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from distckpt.directory.by_hand import Hand, check_nothing_sealed, in_save_order
from distckpt.directory.contents import objects_of_attempt
from distckpt.directory.elsewhere import require_shards
from distckpt.directory.exports import read_export
from distckpt.directory.garbage import delete_attempt
from distckpt.directory.lease import hold
from distckpt.directory.locate import Located, locate, located, read_sealed
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.reports import read_reports
from distckpt.directory.strays import strays
from distckpt.errors import (
    AlreadyExistsError,
    CheckpointNotFoundError,
    DamagedError,
    LogMissingError,
    ObjectNotFoundError,
    StorageError,
)
from distckpt.format import names
from distckpt.format.json.export import MAX_EXPORT_BYTES
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.manifest import MAX_MANIFEST_BYTES
from distckpt.format.json.report import with_reports
from distckpt.storage import PathLike, Store, join, open_store
from distckpt.transfer.carrier import Carrier, Freight, Way
from distckpt.transfer.progress import Progress
from distckpt.transfer.reader import pace_of

logger = logging.getLogger(__name__)

OBJECTS_LOCAL, OBJECTS_REMOTE = 2, 8
"""Objects under way at once."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checkpoint at the source. ``alone`` is where it lies if it was copied there without its directory's log."""

    record: CheckpointRecord
    is_preserved: bool = False
    alone: Located | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where it is copied from: ``wanted`` are the checkpoints there, oldest first, and ``state`` what its log says."""

    store: Store
    wanted: tuple[Wanted, ...]
    state: State = field(default_factory=State)


@dataclass(frozen=True, slots=True)
class Copied:
    """What came of a checkpoint. ``fate`` is "copied", "there already", "passed over", "vanished" or "damaged".

    ``reason`` says why for the last three. ``nbytes`` are the bytes of its objects; of these ``found`` were at the
    destination already, and ``by_server`` did not come through here. ``base`` is the path of the checkpoint that its frozen
    parameters come from, which is not copied with it; '' for none.
    """

    record: CheckpointRecord
    fate: str
    reason: str = ""
    nbytes: int = 0
    found: int = 0
    by_server: int = 0
    base: str = ""


def origin(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Origin:
    """All committed checkpoints of the directory at ``path``, or the one that ``path`` means.

    Raises what ``locate`` raises.
    """
    store = open_store(path, storage_options)
    reports = read_reports(store).found  # before the log, into which they go
    tail = read_tail(store)
    if tail.entry is None:
        where = locate(path, storage_options)
        attempt = where.manifest.attempt
        reports = read_reports(where.store, attempt).found
        state = with_reports(read_tail(where.store).having_attempt(attempt), (one.report for one in reports))
        record = state.find(attempt)
        if record is not None:
            return Origin(where.store, (Wanted(record),))
        return Origin(where.store, (Wanted(read_sealed(where.store, where.folder)[1], alone=where),))
    state = with_reports(tail.state, (one.report for one in reports))
    active = {record.attempt for record in state.active}
    records = reversed(state.newest_first())
    wanted = tuple(Wanted(record, record.attempt not in active) for record in records)
    if not wanted:
        raise CheckpointNotFoundError(store.url, "no checkpoint has been committed here")
    return Origin(store, wanted, state)


class Copying:
    """Copies checkpoints of ``origin`` to the directory ``target``, whose log ``tail`` is.

    Each is committed there as soon as all of it has landed. In a directory in which no job has ever saved they are what
    they were, in the order in which they were saved; beside a job's own ones they are preserved, and the newest stays the
    newest. ``clock`` gives epoch seconds. LogMissingError if there are other checkpoints and no log. To be closed.
    """

    def __init__(
        self, origin: Origin, target: Store, tail: Tail, clock: Callable[[], float], progress: Progress | None = None
    ) -> None:
        check_nothing_sealed(target, tail)
        _check_claimable(target, tail, {one.record.attempt for one in origin.wanted})
        self._origin = origin
        self._target = target
        self._state = tail.state  # all of it
        self._written = tail.head  # as it stands in the log, with older ones in pages
        self._clock = clock
        self._carrier = Carrier(origin.store, target)
        epochs = [names.attempt_epoch(one.record.attempt) for one in origin.wanted]
        self._hand = Hand(target, tail, "cp", epochs)
        self._journey = _Journey(sum(one.record.nbytes for one in origin.wanted), progress)
        is_remote = max(pace_of(origin.store).threads, pace_of(target).threads) > 1
        self._objects = OBJECTS_REMOTE if is_remote else OBJECTS_LOCAL

    def close(self) -> None:
        """End its threads."""
        self._carrier.close()

    def copy(self, wanted: Wanted) -> Copied:
        """Have one checkpoint at the target, and in its log.

        What is damaged at the source, or was retired while it was copied, is left out, and nothing of it stays. Raises
        StorageError if a store fails: what has landed by then is found by the next try; DataElsewhereError if its shards are
        where the source does not look for them; and what ``Hand.write`` raises.
        """
        record = wanted.record
        reason = self._in_the_way(record)
        if reason:
            self._journey.leave_out(record.nbytes)
            return Copied(record, "passed over", reason)
        try:
            with self._held(wanted):
                return self._copy(wanted)
        except (CheckpointNotFoundError, ObjectNotFoundError, DamagedError) as error:
            is_gone = wanted.alone is None and self._has_retired(record)
            if record.attempt not in self._state.known():
                delete_attempt(self._target, _folder(record))
            if is_gone:
                return Copied(record, "vanished", "it was retired meanwhile")
            if isinstance(error, DamagedError):
                return Copied(record, "damaged", str(error))
            raise

    def _has_retired(self, record: CheckpointRecord) -> bool:
        return record.attempt not in read_tail(self._origin.store).having_attempt(record.attempt).alive()

    def _in_the_way(self, record: CheckpointRecord) -> str:
        """Why it cannot be committed at the target; '' if it can."""
        if any(one.attempt == record.attempt for one in self._state.retiring):
            return "it is being deleted at the destination"
        for one in self._state.alive().values():
            if (one.name, one.number) == (record.name, record.number) and one.attempt != record.attempt:
                return f"the destination has attempt {one.attempt} of that number"
        return ""

    @contextlib.contextmanager
    def _held(self, wanted: Wanted) -> Iterator[None]:
        """With a lease, if the source has a log and can be written to. Without one it may vanish, and nothing worse."""
        with contextlib.ExitStack() as stack:
            if wanted.alone is None:
                try:
                    lease = hold(self._origin.store, wanted.record.attempt, f"distckpt cp to {self._target.url}")
                    stack.enter_context(lease)
                except StorageError as error:
                    logger.warning("no lease could be written, so what is copied may be retired meanwhile: %s", error)
            yield

    def _copy(self, wanted: Wanted) -> Copied:
        record = wanted.record
        where = wanted.alone or located(self._origin.store, record)
        base = where.manifest.base_path
        is_there = record.attempt in self._state.alive()
        if not is_there:
            require_shards(where)
        freights = [] if is_there else list(_freights(where, _folder(record)))
        exported = list(self._exported(where, record))
        nbytes = sum(one.size for one in (*freights, *exported))
        self._journey.is_longer(nbytes - record.nbytes)
        ways = self._carry([*freights, *exported])
        if exported:
            self._put_small(where, record, names.EXPORT, MAX_EXPORT_BYTES)
        if is_there:
            return Copied(record, "there already", "", nbytes, ways[Way.THERE], ways[Way.SERVER], base)
        self._put_small(where, record, names.MANIFEST, MAX_MANIFEST_BYTES)
        self._check_landed(record, freights)
        self._commit(wanted)
        return Copied(record, "copied", "", nbytes, ways[Way.THERE], ways[Way.SERVER], base)

    def _exported(self, where: Located, record: CheckpointRecord) -> Iterator[Freight]:
        """The files of the export, if there is one that the target has not."""
        export = read_export(where.store, where.folder)
        if export is None or read_export(self._target, _folder(record)) == export:
            return
        for path, file in export.files():
            yield Freight(where.object_path(path), f"{_folder(record)}/{path}", file.size, file.crc32c)

    def _carry(self, freights: Sequence[Freight]) -> dict[Way, int]:
        """Bytes by the way that they took."""
        ways = dict.fromkeys(Way, 0)
        with ThreadPoolExecutor(self._objects, thread_name_prefix="distckpt-object") as pool:
            going = [(one, pool.submit(self._carrier.carry, one, self._journey.moved)) for one in freights]
            try:
                for one, done in going:
                    ways[done.result()] += one.size
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return ways

    def _put_small(self, where: Located, record: CheckpointRecord, name: str, most: int) -> None:
        """What makes it count, once all that it speaks of is there."""
        data = where.store.read(where.object_path(name), most)
        path = f"{_folder(record)}/{name}"
        try:
            self._target.put_if_absent(path, data)
        except AlreadyExistsError:
            if self._target.read(path, most) != data:
                reason = "something else is there. Remove it, if nobody needs it, and copy again"
                raise StorageError(join(self._target.url, path), reason) from None

    def _check_landed(self, record: CheckpointRecord, freights: Iterable[Freight]) -> None:
        """Look once more, as nobody will after the commit."""
        there = {info.path: info.size for info in objects_of_attempt(self._target, _folder(record))}
        for one in freights:
            if there.get(one.path) != one.size:
                raise StorageError(join(self._target.url, one.path), "it had been written, and is there no more")

    def _commit(self, wanted: Wanted) -> None:
        self._state = after = self._with(self._state, wanted)
        written = self._with(self._written, wanted)
        # What is older than something in a page has its place among that.
        is_last = after.active[-1:] and after.active[-1].attempt == wanted.record.attempt
        written = written if is_last or wanted.is_preserved or after.run else after
        self._written = self._hand.write("commit", written, self._clock()).state

    def _with(self, state: State, wanted: Wanted) -> State:
        """The state at the target with one more checkpoint. Pins stay behind: they are of the source."""
        state, (record,) = state.counted(msgspec.structs.replace(wanted.record, pinned=False))
        if state.newest() is None and not state.pages:
            last = self._origin.state.last_preserved_timestamp or record.time - 1.0
            state = msgspec.structs.replace(state, last_preserved_timestamp=last)
        if state.run or wanted.is_preserved:
            return msgspec.structs.replace(state, preserved=(*state.preserved, record))
        return msgspec.structs.replace(state, active=tuple(in_save_order((*state.active, record))))


def _check_claimable(target: Store, tail: Tail, ours: Collection[str]) -> None:
    """Without a log nobody knows what counts of what is there, but for what an interrupted copy has left."""
    folders = {} if tail.entry is not None else dict.fromkeys(stray.folder for stray in strays(target, ours))
    if folders:
        raise LogMissingError(target.url, list(folders))


class _Journey:
    """How far all of it has come."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def moved(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def is_longer(self, nbytes: int) -> None:
        with self._lock:
            self._total += nbytes

    def leave_out(self, nbytes: int) -> None:
        self.is_longer(-nbytes)


def _freights(where: Located, folder: str) -> Iterator[Freight]:
    manifest = where.manifest
    index = (manifest.index_size, manifest.index_crc32c)
    yield Freight(where.object_path(names.INDEX), f"{folder}/{names.INDEX}", *index)
    for shard in sorted(manifest.shards, key=lambda shard: -shard.size):  # what takes longest begins first
        name = names.shard_name(shard.rank, shard.shard)
        yield Freight(where.object_path(name), f"{folder}/{name}", shard.size, shard.crc32c)


def _folder(record: CheckpointRecord) -> str:
    return names.attempt_folder(record.name, record.number, record.attempt)


def chosen(origin: Origin, since: tuple[str, float] | None, newest: bool) -> Origin:
    """What of it is wanted: with a ``number`` or a ``time`` (epoch seconds) at least ``since``, or the newest alone.

    CheckpointNotFoundError if that is none.
    """
    wanted = origin.wanted[-1:] if newest else origin.wanted
    if since is not None:
        kind, least = since
        wanted = tuple(one for one in wanted if getattr(one.record, kind) >= least)
    if not wanted:
        raise CheckpointNotFoundError(origin.store.url, "no checkpoint here is that new")
    return replace(origin, wanted=wanted)
