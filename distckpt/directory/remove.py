"""Taking checkpoints out of a log and then away, in the order in which retention does it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import msgspec

from distckpt.directory.by_hand import Hand, check_nothing_sealed, check_quiet
from distckpt.directory.chosen import Chosen
from distckpt.directory.elsewhere import require_shards
from distckpt.directory.garbage import delete_attempt
from distckpt.directory.leases import Leases
from distckpt.directory.locate import located
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.pins import pins
from distckpt.directory.tags import tags_by_attempt
from distckpt.errors import CoordinatorError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import Store, join

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """An attempt that is in the log no more. ``left`` says why its objects still lie there; '' if they are gone."""

    record: CheckpointRecord
    left: str = ""


def plan_removal(
    chosen: Iterable[Chosen], force: bool, now: float, leases: Leases
) -> tuple[Tail, tuple[CheckpointRecord, ...]]:
    """The log as it stands, and the attempts of the checkpoints to be removed. All are of one directory.

    ``leases`` has watched its leases: whose reader was killed may be removed once that has been seen for long enough.

    CoordinatorError if one is pinned or being read, and unless ``force`` if one is the newest, or if a job may be running;
    DamagedError if the newest entries of the log cannot be read; DataElsewhereError if the shards of one are where ``store``
    does not look, and would stay. ``now`` is in epoch seconds.
    """
    chosen = tuple(chosen)
    store = chosen[0].store
    tail = read_tail(store)
    if tail.damaged:
        raise DamagedError(join(store.url, tail.damaged[0].path), "the newest entries of the log cannot be read")
    folders = {one.folder for one in chosen}
    state = tail.having_numbers(*(record.number for one in chosen for record in one.records))
    records = tuple(record for record in state.newest_first() if _folder(record) in folders)
    _check_free(store, records, leases)
    if not force:
        check_quiet(store, tail, now, "removing")
        newest = tail.newest()
        if newest is not None and newest in records:
            raise CoordinatorError(
                f"{join(store.url, _folder(newest))} is the newest checkpoint, with which a job would go on. Pass --force"
            )
    check_nothing_sealed(store, tail)
    _require_shards(store, records)
    return tail, records


def readers(leases: Leases, chosen: Iterable[Chosen]) -> bool:
    """Whether somebody holds a lease on one of these, as far as is known yet; or nobody can tell."""
    leased = leases.read()
    chosen = tuple(chosen)
    folders = {one.folder for one in chosen}
    state = read_tail(leases.store).having_numbers(*(record.number for one in chosen for record in one.records))
    return bool(leased.failed) or any(
        record.attempt in leased.attempts and _folder(record) in folders for record in state.newest_first()
    )


def remove(
    store: Store,
    tail: Tail,
    records: Collection[CheckpointRecord],
    clock: Callable[[], float],
    leases: Leases,
) -> list[Removed]:
    """Retire the attempts in the log, read the leases, delete the objects of those that are free, forget those.

    Killed at any moment, nothing half can be read: what is left is retiring in the log, and `distckpt gc` or the next
    coordinator goes on. ``clock`` gives epoch seconds. Raises what ``Hand.write`` raises; then nothing was deleted.
    """
    hand = Hand(store, tail, "rm")
    attempts = {record.attempt for record in records}

    def alive(of: tuple[CheckpointRecord, ...]) -> tuple[CheckpointRecord, ...]:
        return tuple(record for record in of if record.attempt not in attempts)

    state = tail.having_numbers(*(record.number for record in records))
    retired = msgspec.structs.replace(
        state,
        active=alive(state.active),
        preserved=alive(state.preserved),
        retiring=(*state.retiring, *records),
    )
    entry = hand.write("retire", retired, clock())
    leased = leases.read()
    removed = [_deleted(store, record, leased.failed, leased.attempts) for record in records]
    gone = {one.record.attempt for one in removed if not one.left}
    if gone:
        hand.write("forget", _without(entry.state, gone), clock())
    return removed


def _without(state: State, gone: Collection[str]) -> State:
    return msgspec.structs.replace(
        state, retiring=tuple(record for record in state.retiring if record.attempt not in gone)
    )


def _deleted(store: Store, record: CheckpointRecord, failed: str, leased: Collection[str]) -> Removed:
    if failed or record.attempt in leased:
        return Removed(record, failed or "somebody has begun to read it")
    try:
        delete_attempt(store, names.attempt_folder(record.name, record.number, record.attempt))
    except (StorageError, DamagedError) as error:
        return Removed(record, str(error))
    return Removed(record)


def _require_shards(store: Store, records: Collection[CheckpointRecord]) -> None:
    """DataElsewhereError if what is deleted here would leave shards in another place, with nothing that refers to them."""
    for record in records:
        try:
            where = located(store, record)
        except (DamagedError, StorageError) as error:  # which is no reason to keep it
            logger.debug("it cannot be told where the shards of %s are: %s", record.attempt, error)
            continue
        require_shards(where)


def _check_free(store: Store, records: Collection[CheckpointRecord], leases: Leases) -> None:
    pinned, names_of = pins(store), tags_by_attempt(store)
    leased = leases.read()
    if leased.failed:
        raise CoordinatorError(f"{store.url}: nothing is removed while it is not known who reads what: {leased.failed}")
    for record in records:
        path = join(store.url, _folder(record))
        if record.pinned or record.attempt in pinned:
            raise CoordinatorError(f"{path} is pinned. Run `distckpt unpin {path}` first")
        for name in names_of.get(record.attempt, ()):
            raise CoordinatorError(f"{path} has the tag {name}. Run `distckpt untag {join(store.url, name)}` first")
        if record.attempt in leased.attempts:
            raise CoordinatorError(
                f"{path} is being read by somebody who holds a lease on it, or was killed and held one. Try again later, or "
                "pass --wait, which looks until nobody does"
            )


def _folder(record: CheckpointRecord) -> str:
    return names.checkpoint_folder(record.name, record.number)
