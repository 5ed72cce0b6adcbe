"""Appending an entry for the machine: what has become of it, in the machine's words."""

from __future__ import annotations

import logging
from collections.abc import Callable

from distckpt.coordinator.machine.actions import Appended, AppendRefused, AppendUnknown, Event, NameTaken
from distckpt.directory.log import append
from distckpt.format.json.entry_sealer import EntrySealer
from distckpt.format.json.log import Entry
from distckpt.storage import Store

logger = logging.getLogger(__name__)


def append_entry(store: Store, entry: Entry, sealer: EntrySealer, on_entry: Callable[[int], None] | None) -> Event:
    """Append it once. ``on_entry`` is told the newest number of the log if an entry is at that place. Raises as ``append``."""
    result = append(store, entry, sealer)
    if result.outcome in ("appended", "taken") and on_entry is not None:
        on_entry(max(result.newest, entry.seq))
    if result.outcome == "appended":
        _warn_of_clock(store, entry)
        return Appended(entry, result.newest)
    if result.outcome == "taken":
        return NameTaken(entry, result.found, result.newest)
    if result.outcome == "refused":
        logger.error("%s: the entry %s is not written: %s", store.url, entry.kind, result.reason)
        return AppendRefused(entry, result.reason)
    return AppendUnknown(entry, result.reason)


def _warn_of_clock(store: Store, entry: Entry) -> None:
    behind = entry.state.last_preserved_timestamp - entry.time
    if entry.kind == "run" and behind > 0 and (entry.state.active or entry.state.preserved):
        logger.warning(
            "%s: time.time() is %.0f s behind the last preserved checkpoint: what is there stays for good",
            store.url,
            behind,
        )
