"""How long a range usually takes, so that one that takes much longer is noticed."""

from __future__ import annotations

from collections import deque
from statistics import median

STRAGGLING = 4.0
_LEAST_SECONDS = 1.0
_LEAST_BYTES = 1 << 20
_ENOUGH = 8


class Usual:
    """The last ranges of all threads."""

    def __init__(self) -> None:
        self._paces: deque[float] = deque(maxlen=32)

    def note(self, nbytes: int, seconds: float) -> None:
        """A range has come."""
        self._paces.append(seconds / max(nbytes, _LEAST_BYTES))

    def limit(self, nbytes: int) -> float | None:
        """After how many seconds a range of that length is a straggler; None while too few have come to say that."""
        paces = list(self._paces)
        if len(paces) < _ENOUGH:
            return None
        return max(_LEAST_SECONDS, STRAGGLING * median(paces) * max(nbytes, _LEAST_BYTES))
