"""What there is to show of a run, read from its directory."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from distckpt.cli.grouping import Standing, standings
from distckpt.cli.listing import Listed, in_order
from distckpt.directory.locate import located
from distckpt.directory.newest import has_manifest
from distckpt.directory.picture import Picture
from distckpt.directory.reports import read_reports
from distckpt.directory.stats import read_stats
from distckpt.directory.strays import read_run
from distckpt.errors import CheckpointNotFoundError, DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.lease import MAX_LEASE_BYTES, Lease
from distckpt.format.json.log import State
from distckpt.format.json.manifest import Manifest
from distckpt.format.json.report import with_reports
from distckpt.format.json.sealed import unseal
from distckpt.storage import MOST_NAMES, Store, at_most

MOST_LOOKED_FOR = 200
"""So many of the newest checkpoints are looked for on storage: a request each."""


@dataclass(frozen=True, slots=True)
class Overview:
    """A run at a moment, ``read_at`` in epoch seconds: ``listed`` oldest first, ``wrong`` what could not be read or is gone.

    ``ended``: the log says that training is over. ``newest`` is the manifest of the newest checkpoint, if it could be read.
    """

    picture: Picture
    read_at: float
    ended: bool
    listed: tuple[Listed, ...]
    leases: tuple[Lease, ...]
    groups: tuple[Standing, ...]
    wrong: tuple[str, ...]
    newest: Manifest | None = None


def gather(store: Store, now: float) -> Overview:
    """All of it, at ``now``. StorageError if the store cannot be read, LogMissingError if there are checkpoints and no log.

    CheckpointNotFoundError if no run has begun there, DamagedError if no entry of the log can be read; whatever else is
    damaged is told in ``wrong``.
    """
    wrong: list[str] = []
    reports = read_reports(store)  # before the log, into which they go
    tail = read_run(store)
    if tail.entry is None:
        raise CheckpointNotFoundError(store.url, "no run has saved here")
    state, lost = tail.readable()
    wrong += [f"{error}" for error in tail.damaged]
    wrong += [f"{one.error}" for one in lost]
    state = with_reports(state, (one.report for one in reports.found))
    missing = frozenset(_missing(store, state))
    leases = tuple(_leases(store, wrong))
    groups = tuple(_groups(store, wrong))
    told = read_stats(store)
    wrong += told.passed_over
    pinned = {lease.attempt for lease in leases if lease.seconds is None}
    listed = tuple(in_order(state, missing, pinned, {lease.attempt for lease in leases} - pinned))
    wrong += [f"{one.name} is in the log, and not on storage" for one in listed if "missing" in one.marks]
    picture = Picture(store.url, told.history, tuple(reversed(state.newest_first())), told.passed_over)
    newest = _newest(store, state, missing, wrong)
    return Overview(picture, now, state.ended, listed, leases, groups, tuple(wrong), newest)


def _newest(store: Store, state: State, missing: Collection[str], wrong: list[str]) -> Manifest | None:
    """Of the newest checkpoint that is there."""
    for record in state.newest_first():
        if record.attempt not in missing:
            try:
                return located(store, record).manifest
            except ObjectNotFoundError:
                return None  # retired meanwhile
            except DamagedError as error:
                wrong.append(str(error))
                return None
    return None


def _missing(store: Store, state: State) -> Iterator[str]:
    """Attempts that may be opened, and are not there, of the newest ones."""
    gone = [
        record for record in itertools.islice(state.newest_first(), MOST_LOOKED_FOR) if not has_manifest(store, record)
    ]
    alive = read_run(store).readable()[0].alive() if gone else {}
    return (record.attempt for record in gone if record.attempt in alive)  # others have been retired meanwhile


def _leases(store: Store, wrong: list[str]) -> Iterator[Lease]:
    for info in at_most(MOST_NAMES, store.list(names.LEASES), f"{store.url}/{names.LEASES}"):
        try:
            yield unseal(store.read(info.path, MAX_LEASE_BYTES), Lease, info.path, MAX_LEASE_BYTES)
        except ObjectNotFoundError:
            continue  # released since the listing
        except DamagedError as error:
            wrong.append(str(error))


def _groups(store: Store, wrong: list[str]) -> Iterator[Standing]:
    try:
        yield from standings(store)
    except DamagedError as error:
        wrong.append(str(error))
