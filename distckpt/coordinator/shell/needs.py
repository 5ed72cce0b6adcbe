"""Who needs which checkpoints: leases, groups of readers and reports, read in this order."""

from __future__ import annotations

import logging

from distckpt.coordinator.machine.actions import LeasesRead, ReadLeases, SkipsTold, TellSkips
from distckpt.coordinator.machine.following import Followed, Following
from distckpt.directory.chain import Newest
from distckpt.directory.groups import read_groups, skip, waiting, wanted_by
from distckpt.directory.leases import Leases
from distckpt.directory.reports import read_reports
from distckpt.format.json.group import GroupEntry, GroupState
from distckpt.format.json.log import State
from distckpt.format.json.report import Reported
from distckpt.storage import Store, join

logger = logging.getLogger(__name__)

MOST_REPORTS = 1024
"""How many reports are folded at a time. What has come besides is next."""


class Needs:
    """Reads who needs what of one directory, again and again. What is wrong is logged once. For one thread at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._leases = Leases(store)
        self._groups: dict[str, Newest[GroupEntry]] = {}
        self._told: set[str] = set()
        self._damaged: set[str] = set()

    def read(self, action: ReadLeases) -> LeasesRead:
        """What is needed now. If it cannot all be read, why: then nothing is to be deleted, for it may be of anything.

        Groups are read before reports: what a group is done with has been reported by then.
        """
        leased = self._leases.read()
        if leased.failed:
            return LeasesRead(frozenset(), leased.failed)
        try:
            groups = read_groups(self._store, self._groups)
            state = wanted_by(self._store, action.state, groups.values())
            reports = read_reports(self._store, told=self._damaged, most=MOST_REPORTS)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not have anything deleted
            self._tell(str(error), f"nothing is deleted while it cannot be read who needs what: {error}")
            return LeasesRead(frozenset(), str(error))
        for name in action.named - groups.keys():
            self._tell(
                name,
                f"{self._store.url}: no worker has begun the group {name!r} yet, for which retention waits: until then BestN "
                "keeps every checkpoint",
            )
        found = tuple(following(name, group, state) for name, group in groups.items())
        followed = Followed(found, action.state.commits, reports.unclear)
        return LeasesRead(leased.attempts, "", leased.pinned, followed, reports.found)

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s", message)


def tell_skips(store: Store, action: TellSkips) -> SkipsTold:
    """Say to each group what it does not get."""
    done = True
    for group, records in action.skips.items():
        try:
            skip(store, group, records)
        except Exception as error:  # noqa: BLE001 - the others are to be told, and this one stays as it is
            done = False
            logger.warning("the group %s lags, and what it wants stays, as it could not be told: %s", group, error)
        else:
            gone = ", ".join(f"{record.name}-{record.number}" for record in records)
            logger.warning("the group %s lags, and does not get %s: more than max_backlog wait for it", group, gone)
    return SkipsTold(done)


def delete_reports(store: Store, reports: tuple[Reported, ...]) -> None:
    """Delete them in this order; none of an attempt after one that stays."""
    left: set[str] = set()
    for one in reports:
        if one.report.attempt in left:
            continue
        try:
            store.delete(one.path)
        except Exception as error:  # noqa: BLE001 - the log has it; it is folded and deleted again
            left.add(one.report.attempt)
            logger.warning(
                "a report that the log has could not be deleted yet: %s: %s", join(store.url, one.path), error
            )


def following(name: str, group: GroupState, state: State) -> Following:
    """What a group that stands so wants of what the log lists."""
    claimed = frozenset(claim.attempt for claim in group.claims)
    wanted = (record.attempt for record in waiting(group, state))
    return Following(
        group=name,
        every=group.mode == "all",
        max_backlog=group.max_backlog,
        on_lag=group.on_lag,
        claimed=claimed,
        waiting=tuple(attempt for attempt in wanted if attempt not in claimed),
    )
