"""Taking checkpoints into the log that it does not know: folders copied here, or left when the log was deleted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from distckpt.directory.by_hand import Hand, in_save_order
from distckpt.directory.contents import checkpoint_folders, is_there
from distckpt.directory.locate import Located, read_sealed
from distckpt.directory.log import Tail, read_tail
from distckpt.directory.pages import known
from distckpt.directory.strays import Stray, strays_in
from distckpt.directory.verify import Damage, VerifyReport
from distckpt.errors import (
    CheckpointNotFoundError,
    DamagedError,
    DataElsewhereError,
    ObjectNotFoundError,
    StorageError,
)
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, Entry, State
from distckpt.state_file import MAX_STATE_BYTES, CheckpointState, parse
from distckpt.storage import Store, join, parts_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """One stray and what is to become of it.

    ``fate`` is "active" (retention counts it), "preserved" (kept for good), "passed over" or "damaged"; for the last
    two ``reason`` says why. ``damages`` is all that a verification found. ``record`` is None if it has no readable one.
    """

    stray: Stray
    record: CheckpointRecord | None
    fate: str
    reason: str = ""
    damages: tuple[Damage, ...] = ()

    @property
    def adopted(self) -> bool:
        """Whether the log will list it."""
        return self.fate in ("active", "preserved")


@dataclass(frozen=True, slots=True)
class Survey:
    """The log as it stands, every stray with its fate (those to be adopted last, in save order), and what the log's
    ``state`` becomes."""

    tail: Tail
    found: tuple[Found, ...]
    state: State

    @property
    def adopts(self) -> bool:
        """Whether there is anything to write."""
        return any(one.adopted for one in self.found)


def survey(store: Store, check: Callable[[Located], VerifyReport]) -> Survey:
    """Look at every checkpoint that the log does not know, all bytes of it; and for those that it knows by other names.

    Writes nothing. ``check`` verifies one. Raises CheckpointNotFoundError if there is no checkpoint at all, DamagedError
    if the log's newest entries cannot be read.
    """
    tail = read_tail(store)
    if tail.damaged:
        raise DamagedError(
            join(store.url, tail.damaged[0].path),
            "the newest entries of the log cannot be read. Make a manager first, which goes on from the newest one that "
            "can, then adopt",
        )
    is_fresh = tail.newest() is None
    homes = _homes(tail)
    found = [_examined(store, stray, homes, check) for stray in _strays(store, tail, homes)]
    if not found and is_fresh:
        raise CheckpointNotFoundError(store.url, "there is no checkpoint here to adopt")
    whole, rest = _sorted_out(tail, found)
    adopted = _revived(store, whole) if is_fresh else _added(tail, whole)
    state = tail.having_numbers(*(_record(one).number for one in adopted))
    return Survey(tail, (*rest, *adopted), _state(store, state, adopted, is_fresh))


def adopt(store: Store, what: Survey, now: float) -> Entry:
    """Append the entry that lists what the survey adopts; it counts on return. Never overwrites or deletes a checkpoint.

    ``now`` is in epoch seconds. Raises what ``Hand.write`` raises.
    """
    epochs = [names.attempt_epoch(one.stray.attempt) for one in what.found]
    return Hand(store, what.tail, "adopt", epochs).write("claim", what.state, now)


# ---- what there is ------------------------------------------------------------------------------------------------


class _KnownIn(Container[str]):
    """The attempts that the log knows to be in one folder, and those that nobody knows better of."""

    def __init__(self, folder: str, homes: Mapping[str, str], known: Container[str]) -> None:
        self._folder = folder
        self._homes = homes
        self._known = known

    def __contains__(self, attempt: object) -> bool:
        home = self._homes.get(attempt, self._folder) if isinstance(attempt, str) else ""
        return home == self._folder and attempt in self._known


def _homes(tail: Tail) -> dict[str, str]:
    """The folders in which the log has its attempts."""
    state, _ = tail.readable()
    records = (*state.retiring, *state.newest_first())
    return {record.attempt: names.checkpoint_folder(record.name, record.number) for record in records}


def _strays(store: Store, tail: Tail, homes: Mapping[str, str]) -> Iterator[Stray]:
    """What has a manifest and is not where the log has it: a folder that was renamed is not, though its attempt is known."""
    there = known(store, tail.head)
    for folder in sorted(checkpoint_folders(parts_of(store)[0])):
        yield from strays_in(store, folder, _KnownIn(folder, homes, there))


def _examined(store: Store, stray: Stray, homes: Mapping[str, str], check: Callable[[Located], VerifyReport]) -> Found:
    path = join(store.url, stray.path, names.MANIFEST)
    try:
        manifest, record = read_sealed(store, stray.path)
    except DamagedError as error:
        damages = (Damage(error.path, error.key, error.reason),)
        return Found(stray, None, "damaged", f"{error.path}: {error.reason}", damages)
    if manifest.attempt != stray.attempt:
        reason = "it is the manifest of another attempt"
        return Found(stray, record, "damaged", f"{path}: {reason}", (Damage(path, None, reason),))
    true = homes.get(stray.attempt) or names.checkpoint_folder(manifest.name, manifest.number)
    if true != stray.folder:
        return Found(stray, record, "passed over", _misplaced(store, stray, true))
    try:
        report = check(Located(store, stray.path, join(store.url, stray.folder), manifest))
    except DataElsewhereError as error:
        return Found(stray, record, "passed over", str(error))
    if not report.good:
        return Found(stray, record, "damaged", str(report.damages[0]), report.damages)
    return Found(stray, record, "active")


def _misplaced(store: Store, stray: Stray, true: str) -> str:
    if is_there(store, f"{true}/{stray.attempt}/{names.MANIFEST}"):
        return f"it is a copy of {true}, which is here too"
    return f"it was saved as {true}: rename the folder {stray.folder} to that"


def _sorted_out(tail: Tail, found: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """Those to be adopted, oldest first, each number once; and the others."""
    rest = [one for one in found if not one.adopted]
    state = tail.having_numbers(*(_record(one).number for one in found if one.adopted))
    alive = {(record.name, record.number): record for record in state.alive().values()}
    winners: dict[str, Found] = {}
    for one in _oldest_first([one for one in found if one.adopted]):
        record = _record(one)
        listed = alive.get((record.name, record.number))
        if listed is not None and not _lacks_its_entry(tail, record):
            rest.append(replace(one, fate="passed over", reason=f"the log has attempt {listed.attempt} of that number"))
            continue
        loser = winners.pop(one.stray.folder, None)
        if loser is not None:
            reason = f"attempt {record.attempt} of that number is newer"
            rest.append(replace(loser, fate="passed over", reason=reason))
        winners[one.stray.folder] = one
    return list(winners.values()), rest


def _oldest_first(whole: Sequence[Found]) -> list[Found]:
    order = {record.attempt: at for at, record in enumerate(in_save_order(map(_record, whole)))}
    return sorted(whole, key=lambda one: order[_record(one).attempt])


def _lacks_its_entry(tail: Tail, record: CheckpointRecord) -> bool:
    """Whether the last coordinator had come with a save as far as its entry, as when a new one takes it over."""
    if tail.entry is None or names.claim_of(record.attempt) != names.claim_of(tail.entry.commit_id):
        return False
    active = tail.head.active
    return not active or names.attempt_age(record.attempt) > names.attempt_age(active[-1].attempt)


def _record(one: Found) -> CheckpointRecord:
    assert one.record is not None
    return one.record


# ---- what becomes of it -------------------------------------------------------------------------------------------


def _revived(store: Store, whole: Sequence[Found]) -> list[Found]:
    """For a log that lists nothing: all are active, but those that the state file shows to have been preserved."""
    listed = set(_state_file(store).all_model_checkpoint_paths)
    last = max((number for number, one in enumerate(whole) if one.stray.folder in listed), default=0)
    return [
        replace(one, fate="preserved") if number < last and one.stray.folder not in listed else one
        for number, one in enumerate(whole)
    ]


def _added(tail: Tail, whole: Sequence[Found]) -> list[Found]:
    """For a log that lists others: kept for good, and so that the newest stays the newest. A save that only lacked its
    entry is what it would have been."""
    return [one if _lacks_its_entry(tail, _record(one)) else replace(one, fate="preserved") for one in whole]


def _state(store: Store, state: State, adopted: Sequence[Found], fresh: bool) -> State:
    state, records = state.counted(*map(_record, adopted))
    active = [record for record, one in zip(records, adopted, strict=True) if one.fate == "active"]
    preserved = [record for record, one in zip(records, adopted, strict=True) if one.fate == "preserved"]
    folders = {(record.name, record.number) for record in active}
    kept = [record for record in state.active if (record.name, record.number) not in folders]
    replaced = [record for record in state.active if record not in kept and record not in state.preserved]
    return msgspec.structs.replace(
        state,
        active=(*kept, *active),
        preserved=(*state.preserved, *replaced, *preserved),
        last_preserved_timestamp=_last_preserved(store, adopted) if fresh else state.last_preserved_timestamp,
    )


def _last_preserved(store: Store, adopted: Sequence[Found]) -> float:
    """As the state file says, else as for a run that begins with the oldest of them. Epoch seconds."""
    if any(one.fate == "preserved" for one in adopted):
        return _state_file(store).last_preserved_timestamp
    return min((_record(one).time for one in adopted), default=0.0) - 1.0


def _state_file(store: Store) -> CheckpointState:
    """What the state file says, which is no more than a hint; an empty state if it says nothing."""
    nothing = CheckpointState("")
    try:
        state = parse(store.read(names.STATE_FILE, MAX_STATE_BYTES).decode())
    except ObjectNotFoundError:
        return nothing
    except (StorageError, DamagedError, ValueError) as error:
        logger.warning("%s/%s is passed over: %s", store.url, names.STATE_FILE, error)
        return nothing
    return state if math.isfinite(state.last_preserved_timestamp) else nothing
