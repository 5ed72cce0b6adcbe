"""What runs have measured of themselves, on a store: written now and then by their rank 0, read by ``distckpt stats``.

Derived, and never needed: whatever is wrong with one is told and passed over.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from distckpt.directory.goodput import History
from distckpt.directory.log import read_tail
from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.sealed import seal, unseal
from distckpt.format.json.stats import MAX_STATS_BYTES, RunStats
from distckpt.storage import MOST_NAMES, ObjectInfo, Store, at_most, join

KEEP_RUNS = 128
"""Newest runs of which it is kept."""

READERS = 8
"""How many are read at once."""

PRUNE_EVERY = 16
"""Runs until somebody looks again whether there are more: so that a start costs no listing."""


@dataclass(frozen=True, slots=True)
class Told:
    """What all runs of a directory have told, and why what is ``passed_over`` is not in it."""

    history: History
    passed_over: tuple[str, ...]


def write_stats(store: Store, path: str, stats: RunStats) -> None:
    """Put it in the place of what the same run had told before. StorageError if the store fails."""
    store.replace(path, seal(stats))


def prune_stats(store: Store) -> None:
    """Delete all but the KEEP_RUNS that were written last: numbers begin anew where a log was lost."""
    for info in sorted(_listed(store), key=lambda info: (info.modified, info.path))[:-KEEP_RUNS]:
        store.delete(info.path)


def read_stats(store: Store) -> Told:
    """All of them. What is damaged, of a newer release, or of another log than the directory's, is passed over.

    Raises what ``read_tail`` raises, and StorageError.
    """
    head = read_tail(store).head
    found: dict[int, RunStats] = {}
    passed_over: list[str] = []
    with ThreadPoolExecutor(READERS) as pool:
        for stats in pool.map(lambda info: _read(store, info.path), _listed(store)):
            if isinstance(stats, DamagedError):
                passed_over.append(f"{join(store.url, stats.path)}: {stats.reason}")
            elif stats is not None and stats.origin != head.origin:
                passed_over.append(f"run {stats.run} on {stats.host}: it is of another log than this directory's")
            elif stats is not None and (stats.run not in found or found[stats.run].seconds <= stats.seconds):
                found[stats.run] = stats
    return Told(History(tuple(found[run] for run in sorted(found)), head.run), tuple(sorted(passed_over)))


def _read(store: Store, path: str) -> RunStats | DamagedError | None:
    """What is there; what is wrong with it; None if it has been pruned since the listing."""
    try:
        stats = unseal(store.read(path, MAX_STATS_BYTES), RunStats, path, MAX_STATS_BYTES)
    except ObjectNotFoundError:
        return None
    except DamagedError as error:
        return error
    return stats if stats.run == names.stats_run(path) else DamagedError(path, f"it says that it is of run {stats.run}")


def _listed(store: Store) -> list[ObjectInfo]:
    """Those that there are."""
    listed = at_most(MOST_NAMES, store.list(names.STATS), f"{store.url}/{names.STATS}")
    return [info for info in listed if names.stats_run(info.path) is not None]
