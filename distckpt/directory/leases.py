"""Who reads what: the leases of a directory, as retention sees them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distckpt.directory.stillness import Stillness, elapsed
from distckpt.errors import DamagedError, ObjectNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.lease import MAX_LEASE_BYTES, Lease
from distckpt.format.json.sealed import unseal
from distckpt.storage import MOST_NAMES, ObjectInfo, Store, at_most

logger = logging.getLogger(__name__)

UNREADABLE_SECONDS = 3600.0
"""How long a lease that cannot be read counts while nobody renews it. Holders renew theirs every half minute."""


@dataclass(frozen=True, slots=True)
class Leased:
    """Attempts that somebody has a claim on, or why that cannot be told ('' if it can).

    ``pinned`` are those of them that are pinned, by a pin that was there before anybody retired them.
    """

    attempts: frozenset[str]
    failed: str = ""
    pinned: frozenset[str] = frozenset()


def readers_of(store: Store) -> dict[str, tuple[Lease, ...]]:
    """Every reader's lease that there is, by the attempt; who was killed leaves his for a while. Pins and tags are none.

    To be shown: one that cannot be read is left out.
    """
    found: dict[str, tuple[Lease, ...]] = {}
    for info in at_most(MOST_NAMES, store.list(names.LEASES), f"{store.url}/{names.LEASES}"):
        try:
            lease = unseal(store.read(info.path, MAX_LEASE_BYTES), Lease, info.path, MAX_LEASE_BYTES)
        except (ObjectNotFoundError, DamagedError):  # released meanwhile, or it says nothing
            continue
        if lease.seconds is not None:
            found[lease.attempt] = (*found.get(lease.attempt, ()), lease)
    return found


class Leases:
    """Reads the leases of one directory, again and again. What is wrong with one is logged once.

    A lease counts until this observer has seen it unchanged for its duration, by a monotonic clock of its own, whether or
    not it can be deleted then. No time is compared with any other clock's, and what is seen for the first time counts.
    While one cannot be read, nothing may be deleted: it may be of any checkpoint. But if nobody has touched it for an hour,
    nobody holds it. Not safe to use from several threads.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = elapsed) -> None:
        self.store = store
        self._clock = clock
        self._told: set[tuple[str, str]] = set()
        self._stillness = Stillness()
        self._unreadable: list[ObjectInfo] = []
        self._counting: dict[ObjectInfo, float] = {}

    @property
    def unreadable(self) -> tuple[ObjectInfo, ...]:
        """The leases that could not be read when it was looked last, and count no longer."""
        return tuple(self._unreadable)

    @property
    def counting(self) -> Mapping[ObjectInfo, float]:
        """The leases that counted when it was looked last, pins aside: in how many seconds they do not if nobody renews."""
        return self._counting

    def read(self) -> Leased:
        """Attempts that somebody is reading now or has pinned, or why that cannot be told. What has expired is deleted."""
        found, expired = self.look()
        for info in expired:
            self._delete(info)
        return found

    def look(self) -> tuple[Leased, tuple[ObjectInfo, ...]]:
        """As ``read``, with the leases that have expired, and deletes nothing."""
        asked = self._clock()
        self._unreadable, self._counting = [], {}
        try:
            found = at_most(MOST_NAMES, self.store.list(names.LEASES), f"{self.store.url}/{names.LEASES}")
        except (DamagedError, StorageError) as error:
            self._tell("", "nothing is deleted while the leases cannot be listed: %s", error)
            return Leased(frozenset(), str(error)), ()
        self._forget_all_but({info.path for info in found})
        attempts: set[str] = set()
        pinned: set[str] = set()
        expired = []
        failed = ""
        for info in found:
            try:
                data = self.store.read(info.path, MAX_LEASE_BYTES)
            except ObjectNotFoundError:
                continue  # released between listing and reading
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one, retention looks at the others
                failed = self._is_held(info, self._still_for(info, b"", asked), error) or failed
                continue
            still = self._still_for(info, data, asked)
            try:
                lease = unseal(data, Lease, info.path, MAX_LEASE_BYTES)
            except DamagedError as error:
                failed = self._is_held(info, still, error) or failed
                continue
            if lease.seconds is not None and still >= lease.seconds:
                expired.append(info)
                continue
            attempts.add(lease.attempt)
            if lease.seconds is not None:
                self._counting[info] = lease.seconds - still
            if lease.holds:
                pinned.add(lease.attempt)
        leased = Leased(frozenset(), failed) if failed else Leased(frozenset(attempts), "", frozenset(pinned))
        return leased, tuple(expired)

    def _still_for(self, info: ObjectInfo, data: bytes, asked: float) -> float:
        # With what the listing says: a renewal that the store was late to write may bring an old content back.
        fingerprint = info.size, info.modified, hashlib.sha256(data).digest()
        return self._stillness.still_for(info.path, fingerprint, asked=asked, answered=self._clock())

    def _is_held(self, info: ObjectInfo, still: float, error: Exception) -> str:
        """Why nothing may be deleted because of a lease that cannot be read; '' if nobody holds it any more."""
        if still < UNREADABLE_SECONDS:
            self._counting[info] = UNREADABLE_SECONDS - still
            self._tell(info.path, "nothing is deleted while the lease %s cannot be read: %s", info.path, error)
            return f"lease {info.path}: {error}"
        self._unreadable.append(info)
        self._tell(info.path, "the lease %s cannot be read, and is not renewed: it counts no longer", info.path)
        return ""

    def _delete(self, info: ObjectInfo) -> None:
        try:
            self.store.delete(info.path)
        except Exception as error:  # noqa: BLE001 - it has expired all the same
            self._tell(
                info.path, "the lease %s has expired, and stays because it cannot be deleted: %s", info.path, error
            )

    def _tell(self, path: str, message: str, *arguments: object) -> None:
        if (path, message) not in self._told:
            self._told.add((path, message))
            logger.warning(message, *arguments)

    def _forget_all_but(self, paths: set[str]) -> None:
        self._told = {(path, message) for path, message in self._told if path in paths}
        self._stillness.forget_all_but(paths)
