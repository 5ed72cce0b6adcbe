"""What one worker sees of the others: whose claims are dead, and whose back-off is over. By its own clock alone."""

from __future__ import annotations

from collections.abc import Callable, Collection

from distckpt.directory.stillness import Stillness, elapsed
from distckpt.errors import DamagedError, ObjectNotFoundError, StorageError
from distckpt.format import names
from distckpt.format.json.group import Claim, GroupState, Returned
from distckpt.format.json.lease import MAX_LEASE_BYTES
from distckpt.storage import Store

LOOKS = 4
"""How often within a lease's duration it is looked at."""

LONGEST_PAUSE = 15.0


class Onlooker:
    """Looks at the leases of a group's claims, again and again. A claim is dead once its lease is gone, or has not changed

    for its duration since it was first seen so here. Not safe to use from several threads.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = elapsed) -> None:
        self._store = store
        self._clock = clock
        self._leases = Stillness()
        self._backoffs = Stillness()
        self._looked: dict[str, float] = {}
        self._dead: set[str] = set()

    def dead(self, state: GroupState, own: Collection[str]) -> frozenset[str]:
        """The tokens of claims that nobody holds any more. ``own`` are those of this process, which knows better.

        Each lease is looked at four times in its duration at most. What cannot be read is not known to be dead.
        """
        others = {claim.token: claim for claim in state.claims if claim.token not in own}
        self._dead &= others.keys()
        self._looked = {token: when for token, when in self._looked.items() if token in others}
        self._leases.forget_all_but(others)
        for token, claim in others.items():
            if token not in self._dead and self._clock() >= self._looked.get(token, 0.0) + _pause(claim):
                self._looked[token] = self._clock()
                if self._is_dead(claim):
                    self._dead.add(token)
        return frozenset(self._dead)

    def follow(self, state: GroupState) -> None:
        """Forget the back-offs of what is returned no more: a release may bring the same delivery back, to rest anew."""
        self._backoffs.forget_all_but({_delivery(item) for item in state.returned})

    def resting(self, state: GroupState) -> dict[str, float]:
        """The attempts whose back-off is not over, and for how many seconds more."""
        self.follow(state)
        now = self._clock()
        left = {
            item.attempt: item.backoff - self._backoffs.still_for(_delivery(item), "", asked=now, answered=now)
            for item in state.returned
        }
        return {attempt: seconds for attempt, seconds in left.items() if seconds > 0}

    def pause(self, state: GroupState, own: Collection[str]) -> float:
        """For how many seconds nothing that is known here can change but by what others write."""
        now = self._clock()
        looks = [
            self._looked.get(claim.token, now) + _pause(claim) - now
            for claim in state.claims
            if claim.token not in own and claim.token not in self._dead
        ]
        return max(0.0, min([*looks, *self.resting(state).values(), 2 * LONGEST_PAUSE]))

    def _is_dead(self, claim: Claim) -> bool:
        asked = self._clock()
        path = names.lease_path(claim.lease)
        seen: tuple[object, ...] = ()
        try:
            info = self._store.stat(path)
            if info is None:
                return True
            # With what the store says of it: a renewal that was late to be written may bring an old content back.
            seen = info.size, info.modified
            seen = *seen, self._store.read(path, MAX_LEASE_BYTES)
        except ObjectNotFoundError:
            return True
        except DamagedError:
            pass
        except StorageError:
            return False
        return self._leases.still_for(claim.token, seen, asked=asked, answered=self._clock()) >= claim.seconds


def _pause(claim: Claim) -> float:
    return min(claim.seconds / LOOKS, LONGEST_PAUSE)


def _delivery(item: Returned) -> str:
    return f"{item.attempt}#{item.deliveries}"
