"""Records of checkpoints in a state: how they are found, and how a new one takes its place."""

from __future__ import annotations

import msgspec

from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.names import checkpoint_folder


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
    state, (record,) = state.counted(record)
    same = [old for old in state.active if old.number == record.number and old.name == record.name]
    others = [old for old in state.active if old not in same] if same else state.active
    return msgspec.structs.replace(
        state,
        active=(*others, record),
        preserved=(*state.preserved, *(old for old in same if old.pinned)),
        retiring=(*state.retiring, *(old for old in same if not old.pinned)),
        saves=saves,
        ended=False,
    )
