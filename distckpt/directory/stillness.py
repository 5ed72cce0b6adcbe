"""For how long something on storage has not changed, by one observer's own clock: the only age that anybody may act on.

No two clocks are compared. The clock of a host may be off by a day and may step at any time, that of a store is a third
one, and what is written into an object is the word of a fourth. So whoever wants to delete what somebody else may still
need, or to take over from him, watches it, and counts from when he first saw it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable


def elapsed() -> float:
    """Seconds since some moment, by a clock that nobody can set and that goes on while the machine is suspended."""
    # Linux has it under the one name, macOS, whose CLOCK_MONOTONIC goes on in its sleep, under the other.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Stillness:
    """What one observer has seen, and since when it has not changed. A new observer begins with what it sees first.

    Pure: times are those of one monotonic clock, and come with the call. Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Hashable, float]] = {}

    def still_for(self, key: str, fingerprint: Hashable, *, asked: float, answered: float) -> float:
        """For how many seconds, up to ``asked``, what is at ``key`` has been as it is: at least so long, 0 if just seen.

        It was looked at between ``asked`` and ``answered``. Time counts from the answer that first showed it to the
        question that last did: whatever else was there in between came and went unseen only if the ``fingerprint`` can
        come back, so take the content and what the store says of it (size and time of the last change).
        """
        before = self._seen.get(key)
        if before is None or before[0] != fingerprint:
            self._seen[key] = fingerprint, answered
            return 0.0
        return max(0.0, asked - before[1])

    def forget_all_but(self, keys: Collection[str]) -> None:
        """Of what is gone nothing need be known. What comes again is new."""
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
