"""Tags: names that people give to checkpoints. Each is a pin with a name, so that what is tagged is kept."""

from __future__ import annotations

from distckpt.directory.log import read_tail
from distckpt.directory.pins import made_to_hold, read_endless
from distckpt.errors import AlreadyExistsError, CheckpointNotFoundError
from distckpt.format import names
from distckpt.format.json.lease import FORMAT, Lease
from distckpt.format.json.log import CheckpointRecord
from distckpt.format.json.sealed import seal
from distckpt.storage import MOST_NAMES, Store, at_most, join


def tag(store: Store, name: str, attempt: str, holder: str, note: str, now: float) -> Lease:
    """Give a committed checkpoint a name, which no other has, and keep it until the name is taken away.

    It holds as a pin does (``pins.pin``). To give a checkpoint the name that it has does nothing. ValueError for what
    cannot be a name, and for one that another checkpoint has, which keeps it; CheckpointNotFoundError if it came too late;
    StorageError if it could not be written.
    """
    if not names.is_tag(name):
        raise ValueError(
            f"{name!r} cannot be a tag: letters, digits, '.', '_' and '-', 64 at most, and not the name of a checkpoint "
            f"such as ckpt-42, nor {names.STATE_FILE!r}"
        )
    path = names.tag_path(name)
    made = Lease(FORMAT, attempt, holder, None, since=now, note=note)
    try:
        store.put_if_absent(path, seal(made))
    except AlreadyExistsError:
        found = tag_of(store, name)
        if found is None or found.attempt != attempt:
            raise ValueError(
                f"{join(store.url, name)}: another checkpoint has this tag. Run `distckpt untag {join(store.url, name)}` first"
            ) from None
        if found.holds:
            return found
        made = found  # whoever began was killed, or this is our own try whose answer was lost
    return made_to_hold(store, path, made, "tag")


def untag(store: Store, name: str) -> bool:
    """Take a name away; whether there was one."""
    if not names.is_tag(name):
        return False
    there = store.stat(names.tag_path(name)) is not None
    store.delete(names.tag_path(name))
    return there


def tags(store: Store) -> dict[str, Lease]:
    """Every tag, by its name. One that cannot be read is of nothing that is known."""
    found = {}
    for info in at_most(MOST_NAMES, store.list(names.LEASES), f"{store.url}/{names.LEASES}"):
        name = names.tag_name(info.path)
        lease = tag_of(store, name) if name is not None else None
        if name is not None and lease is not None:
            found[name] = lease
    return found


def tags_by_attempt(store: Store) -> dict[str, tuple[str, ...]]:
    """The names that each attempt has, sorted."""
    found: dict[str, tuple[str, ...]] = {}
    for name, lease in sorted(tags(store).items()):
        found[lease.attempt] = (*found.get(lease.attempt, ()), name)
    return found


def tag_of(store: Store, name: str) -> Lease | None:
    """The tag of that name, if there is one."""
    return read_endless(store, names.tag_path(name))


def tagged(store: Store, name: str) -> CheckpointRecord | None:
    """The checkpoint that has this name; None if no tag has it. CheckpointNotFoundError if that checkpoint is gone."""
    lease = tag_of(store, name) if names.is_tag(name) else None
    if lease is None:
        return None
    record = read_tail(store).having_attempt(lease.attempt).alive().get(lease.attempt)
    if record is None:
        raise CheckpointNotFoundError(join(store.url, name), "the checkpoint that had this tag is not there any more")
    return record
