"""What runs have measured of themselves, on a store: written now and then by their rank 0, read by ``distckpt stats``.

Derived, and never needed: whatever is wrong with one is told and passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

from distckpt.directory.goodput import History
from distckpt.directory.log import read_tail
from distckpt.errors import DamagedError, ObjectNotFoundError
from distckpt.format import names
from distckpt.format.json.sealed import seal, unseal
from distckpt.format.json.stats import MAX_STATS_BYTES, RunStats
from distckpt.storage import MOST_NAMES, Store, at_most, join

KEEP_RUNS = 128
"""Newest runs of which it is kept."""

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
    """Delete all but those of the KEEP_RUNS newest runs."""
    for path in _paths(store)[:-KEEP_RUNS]:
        store.delete(path)


def read_stats(store: Store) -> Told:
    """All of them. What is damaged, of a newer release, or of another log than the directory's, is passed over.

    Raises what ``read_tail`` raises, and StorageError.
    """
    state = read_tail(store).state
    found: dict[int, RunStats] = {}
    passed_over = []
    for path in _paths(store):
        try:
            stats = unseal(store.read(path, MAX_STATS_BYTES), RunStats, path, MAX_STATS_BYTES)
        except ObjectNotFoundError:
            continue  # pruned since the listing
        except DamagedError as error:
            passed_over.append(f"{join(store.url, error.path)}: {error.reason}")
            continue
        if stats.origin != state.origin or stats.run != names.stats_run(path):
            passed_over.append(f"{join(store.url, path)}: it is of another log than this directory's")
        elif stats.run not in found or found[stats.run].seconds <= stats.seconds:
            found[stats.run] = stats
    return Told(History(tuple(found[run] for run in sorted(found)), state.run), tuple(passed_over))


def _paths(store: Store) -> list[str]:
    """Where they are, those of the oldest runs first."""
    listed = at_most(MOST_NAMES, store.list(names.STATS), f"{store.url}/{names.STATS}")
    return sorted(info.path for info in listed if names.stats_run(info.path) is not None)
