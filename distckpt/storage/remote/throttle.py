"""How fast requests go to a server that turns some away because there are too many."""

from __future__ import annotations

import time
from collections import deque

_SLOWER = 0.7
_FASTER_A_SECOND = 1.5
_FEW = 4
"""So many in a second may be turned away for whatever reason; each of them waits by itself before it goes again."""

_TOGETHER = 0.25
"""Seconds in which those that are turned away have set out at the same pace: they slow it down once."""

_LEAST = 16.0
_FORGOTTEN = 60.0


class Throttle:
    """Requests a second, of all threads: as many as they like, until the server turns away more than a few.

    From then on a little less than it has taken lately, and faster by the second until it does so again; what would be
    turned away need not be sent. Nobody holds a lock, since a process may fork: two threads that go at the same
    time are a request too many, which does no harm.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._next = 0.0
        self._changed = 0.0
        self._slowed = 0.0
        self._taken: deque[float] = deque(maxlen=4096)
        self._away: deque[float] = deque(maxlen=_FEW)

    def wait(self) -> None:
        """Until it is time for one more."""
        rate = self._rate
        if rate is None:
            return
        now = time.monotonic()
        slot = max(self._next, now)
        self._next = slot + 1 / rate
        time.sleep(slot - now)

    def taken(self) -> None:
        """The server has taken one."""
        now, rate = time.monotonic(), self._rate
        self._taken.append(now)
        if rate is None:
            return
        if now - self._slowed > _FORGOTTEN:
            self._rate = None
            return
        self._rate, self._changed = rate * _FASTER_A_SECOND ** (now - self._changed), now

    def turned_away(self) -> None:
        """The server has turned one away."""
        now = time.monotonic()
        self._away.append(now)
        if now - self._slowed < _TOGETHER or len(self._away) < _FEW or now - self._away[0] > 1.0:
            return
        lately = sum(now - moment < 1.0 for moment in tuple(self._taken))
        rate = self._rate if self._rate is not None else float(lately)
        self._rate, self._changed, self._slowed = max(_LEAST, rate * _SLOWER), now, now
