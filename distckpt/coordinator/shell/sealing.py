"""Turning a complete set of receipts into a checkpoint that only lacks its log entry, and finding such on storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import crc32c
import msgspec
import pyarrow as pa

from distckpt.coordinator.machine.actions import Seal, Sealed, TailRead
from distckpt.coordinator.messages import Receipt
from distckpt.coordinator.shell.workers import each
from distckpt.directory.contents import attempts, checkpoint_folders
from distckpt.directory.elsewhere import require_shards_of_newest
from distckpt.directory.locate import read_sealed
from distckpt.directory.newest import has_manifest
from distckpt.directory.pages import readable
from distckpt.directory.strays import read_run
from distckpt.errors import (
    AlreadyExistsError,
    DamagedError,
    NotSharedError,
    RankFailedError,
    SaveError,
    StoreOutcomeUnknownError,
    UnreadableError,
)
from distckpt.format import names
from distckpt.format.arrow.index import encode_index
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.format.json.left_out import LeftOut
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.format.json.manifest import FORMAT, Manifest, ShardRecord
from distckpt.format.json.sealed import seal
from distckpt.sharding.omission import left_out_of
from distckpt.storage import ObjectInfo, Store, has_far_shards, mark_of, parts_of, place_of

STAT_THREADS = 16


def seal_checkpoint(store: Store, action: Seal, plan_table: pa.Table) -> Sealed:
    """Look at every shard on the store, then write index and manifest; all durable on return.

    Raises NotSharedError when the coordinator cannot see shards, RankFailedError when one is not what its receipt
    says, UnreadableError when no reader would take index or manifest, SaveError or StorageError when they cannot be
    written. Writes nothing unless all shards are there, and nothing that no reader would take.
    """
    folder = names.attempt_folder(action.name, action.number, action.attempt)
    _check_shards(store, action, folder)
    try:
        index = encode_index(plan_table, action.receipts, action.number, action.hosts)
        manifest = seal(_manifest(action, index, mark_of(store), left_out_of(plan_table)))
    except ValueError as error:
        raise UnreadableError(action.number, f"{error}. Save fewer tensors or values, or from fewer ranks") from error
    _put(store, action, f"{folder}/{names.INDEX}", index)
    try:
        _put(store, action, f"{folder}/{names.MANIFEST}", manifest)
    except StoreOutcomeUnknownError as error:
        when = "If it was, and is not collected before, the next coordinator finds the checkpoint whole and commits it"
        raise SaveError(action.number, f"{error}. Whether it was written is not known. {when}") from error
    nbytes = sum(shard.size for _, shard in _shards(action.receipts))
    return Sealed(action.attempt, len(manifest), crc32c.crc32c(manifest), nbytes)


def _manifest(action: Seal, index: bytes, data: str, left_out: LeftOut | None) -> Manifest:
    return Manifest(
        format=FORMAT,
        name=action.name,
        number=action.number,
        attempt=action.attempt,
        epoch=action.epoch,
        time=action.time,
        world_size=action.plan.world_size,
        index_size=len(index),
        index_crc32c=crc32c.crc32c(index),
        shards=tuple(
            ShardRecord(rank=rank, shard=shard.shard, size=shard.size, crc32c=shard.crc32c)
            for rank, shard in _shards(action.receipts)
        ),
        data=data,
        left_out=left_out,
    )


def _shards(receipts: Mapping[int, Receipt]) -> Iterator[tuple[int, ShardReceipt]]:
    for rank in sorted(receipts):
        for shard in sorted(receipts[rank].shards, key=lambda shard: shard.shard):
            yield rank, shard


def _check_shards(store: Store, action: Seal, folder: str) -> None:
    expected = list(_shards(action.receipts))
    paths = [f"{folder}/{names.shard_name(rank, shard.shard)}" for rank, shard in expected]
    found = _stats(store, folder, paths)
    unseen = sorted({rank for (rank, _), info in zip(expected, found, strict=True) if info is None})
    if unseen:
        hosts = {rank: action.hosts.get(rank, "") for rank in unseen}
        raise NotSharedError(action.number, parts_of(store)[-1].url, unseen, hosts)
    for (rank, shard), path, info in zip(expected, paths, found, strict=True):
        wrong = info is not None and (info.size != shard.size or info.crc32c not in (None, shard.crc32c))
        if wrong:
            reason = f"{place_of(store, path)} has {info.size if info else 0} bytes on the store and {shard.size} in its receipt"
            raise RankFailedError(action.number, rank, action.hosts.get(rank, ""), reason)


def _stats(store: Store, folder: str, paths: Sequence[str]) -> list[ObjectInfo | None]:
    """What is at each path in ``folder``. Behind a URL a page of a listing says it of hundreds at once."""
    listed = {info.path: info for info in store.list(folder)} if has_far_shards(store) and len(paths) > 1 else {}
    missing = [path for path in paths if path not in listed]
    asked = each(store.stat, missing, STAT_THREADS) if len(missing) >= STAT_THREADS else map(store.stat, missing)
    stats = dict(zip(missing, asked, strict=True))
    return [listed.get(path) or stats[path] for path in paths]


def _put(store: Store, action: Seal, path: str, data: bytes) -> None:
    try:
        store.put_if_absent(path, data)
    except AlreadyExistsError:
        # Our own earlier try, whose acknowledgement was lost, left the very same bytes; anything else is not ours.
        if store.read(path, len(data) + 1) != data:
            raise SaveError(action.number, f"{store.url}/{path} exists with other content") from None


def read_log_tail(store: Store) -> TailRead:
    """Where the log stands, and the checkpoints that only lack their commit entry.

    When the newest entries are damaged, the one before them is used, and checkpoints that it lists but that have no
    manifest any more move to ``retiring``: one of the lost entries may have retired them. LogMissingError if there is
    no log although there are checkpoints: they belong to somebody, and the directory is not to be claimed.
    DataElsewhereError if the newest has its shards where ``store`` does not look for them.
    """
    tail = read_run(store)
    if tail.entry is None:
        return TailRead(tail.seq, None)
    entry = tail.entry
    require_shards_of_newest(store, entry.state)
    if tail.damaged:
        entry = msgspec.structs.replace(entry, state=_without_vanished(store, entry.state))
    return TailRead(tail.seq, entry, tuple(_complete(store, tail.entry)))


def _without_vanished(store: Store, state: State) -> State:
    at_hand, _ = readable(store, state)
    gone = [record for record in at_hand.active if not has_manifest(store, record)]
    if not gone:
        return state
    state = at_hand  # what has vanished of pages, too
    return msgspec.structs.replace(
        state,
        active=tuple(record for record in state.active if record not in gone),
        retiring=(*state.retiring, *gone),
    )


def _complete(store: Store, entry: Entry) -> Iterator[CheckpointRecord]:
    known, active = entry.state.known(), entry.state.active
    last = names.attempt_age(active[-1].attempt) if active else (0, "")
    home = parts_of(store)[0]  # which has the manifests
    for folder in checkpoint_folders(home):
        for attempt in attempts(home, folder):
            # Of the same coordinator as the newest entry: a folder that was copied here from another run is not ours.
            is_of_last = names.claim_of(attempt) == names.claim_of(entry.commit_id)
            # What is older than the last one is committed, perhaps in a page, or was passed over.
            if is_of_last and attempt not in known and names.attempt_age(attempt) > last:
                record = _complete_record(store, f"{folder}/{attempt}")
                if record is not None:
                    yield record


def _complete_record(store: Store, folder: str) -> CheckpointRecord | None:
    try:
        return _record_if_whole(store, folder)
    except DamagedError:
        return None  # no manifest, half of one, or a link in a file's place: an attempt that never came to its end


def _record_if_whole(store: Store, folder: str) -> CheckpointRecord | None:
    manifest, record = read_sealed(store, folder)
    if names.attempt_folder(manifest.name, manifest.number, manifest.attempt) != folder:
        return None
    sizes = {names.shard_name(shard.rank, shard.shard): shard.size for shard in manifest.shards}
    sizes[names.INDEX] = manifest.index_size
    for name, size in sizes.items():
        info = store.stat(f"{folder}/{name}")
        if info is None or info.size != size:
            return None
    return record
