"""Questions to a checkpoint state, and the changes that log entries make to it."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.names import attempt_age, checkpoint_folder

Records = tuple[CheckpointRecord, ...]


def never_committed(name: str, number: int, attempt: str, time: float, world_size: int) -> CheckpointRecord:
    """What stands among the retiring for an attempt that failed: a record without a manifest."""
    return CheckpointRecord(
        name=name,
        number=number,
        attempt=attempt,
        manifest_size=0,
        manifest_crc32c=0,
        time=time,
        world_size=world_size,
        nbytes=0,
    )


def find_number(state: State, number: int, name: str) -> CheckpointRecord | None:
    """The newest committed record of ``number``, one called ``name`` if there is one, or None."""
    found = [record for record in state.newest_first() if record.number == number]
    return next((record for record in found if record.name == name), found[0] if found else None)


def find_folder(state: State, folder: str) -> CheckpointRecord | None:
    """The newest committed record of a folder like ``ckpt-42``, or None."""
    found = (record for record in state.newest_first() if checkpoint_folder(record.name, record.number) == folder)
    return next(found, None)


def record_path(directory: str, record: CheckpointRecord) -> str:
    """What people call a checkpoint: ``<directory>/<name>-<number>``."""
    return f"{directory}/{checkpoint_folder(record.name, record.number)}"


def committed(state: State, record: CheckpointRecord, saves: int) -> State:
    """``record`` becomes the newest, the last of ``saves`` saves. An active one of its name and number makes room.

    The replaced one retires, unless somebody pinned it: then it is preserved.
    """
    same = [old for old in state.active if (old.name, old.number) == (record.name, record.number)]
    return msgspec.structs.replace(
        state,
        active=(*(old for old in state.active if old not in same), record),
        preserved=(*state.preserved, *(old for old in same if old.pinned)),
        retiring=(*state.retiring, *(old for old in same if not old.pinned)),
        saves=saves,
    )


def rolled_forward(state: State, complete: Iterable[CheckpointRecord]) -> State:
    """Commit what a dead coordinator had sealed but not committed, in the order in which it had begun.

    A save that began before the newest checkpoint was passed over: it failed for the ranks, and does not come back.
    Clocks have no say in this.
    """
    known = state.known()
    last = attempt_age(state.active[-1].attempt) if state.active else (0, "")
    for record in sorted(complete, key=lambda record: attempt_age(record.attempt)):
        if record.attempt not in known and attempt_age(record.attempt) > last:
            state = committed(state, record, state.saves)
    return state


def retired(state: State, active: Records, preserved: Records, retire: Records, last_preserved: float) -> State:
    """A sweep's outcome: ``preserved`` are kept for ever, ``retire`` may not be opened any more."""
    return msgspec.structs.replace(
        state,
        active=active,
        preserved=state.preserved + preserved,
        retiring=state.retiring + retire,
        last_preserved_timestamp=last_preserved,
    )


def discarded(state: State, record: CheckpointRecord) -> State | None:
    """A failed attempt is to be deleted and never committed. None if the state knows it already."""
    if record.attempt in state.known():
        return None
    return msgspec.structs.replace(state, retiring=(*state.retiring, record))


def forgotten(state: State, attempts: frozenset[str]) -> State | None:
    """Nothing is left of those retiring attempts. None if there is nothing to change."""
    left = tuple(record for record in state.retiring if record.attempt not in attempts)
    return msgspec.structs.replace(state, retiring=left) if len(left) < len(state.retiring) else None


def pinned(state: State, number: int, name: str) -> State | None:
    """The newest record of ``number`` is pinned. None if there is no such record or it is pinned already."""
    record = find_number(state, number, name)
    return None if record is None or record.pinned else _repinned(state, {record.attempt}, pinned=True)


def unpinned(state: State, number: int) -> State | None:
    """No record of ``number`` is pinned. None if that is so already."""
    attempts = {record.attempt for record in state.newest_first() if record.number == number and record.pinned}
    return _repinned(state, attempts, pinned=False) if attempts else None


def _repinned(state: State, attempts: set[str], *, pinned: bool) -> State:
    def changed(records: Records) -> Records:
        return tuple(
            msgspec.structs.replace(record, pinned=pinned) if record.attempt in attempts else record
            for record in records
        )

    return msgspec.structs.replace(state, active=changed(state.active), preserved=changed(state.preserved))
