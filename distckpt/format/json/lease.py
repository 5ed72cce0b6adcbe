"""A reader's claim on a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from distckpt.format.json.sealed import Sealed

FORMAT = 2
MAX_LEASE_BYTES = 64 << 10
MAX_LEASE_SECONDS = 86400.0
"""For so long at most a reader that is dead may keep what it had leased."""


class Lease(Sealed, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``holder`` reads ``attempt``. It counts until it has not changed for ``seconds``, by the clock of whoever looks.

    Each renewal moves ``beat`` on. There is no time in it, for no two clocks need agree.

    Without an end (None) it is a pin: made at ``since``, with a ``note`` that says why, it counts until it is taken
    away. It ``holds`` once its maker has found the attempt alive in the log after the pin was written: who retires it
    from then on finds the pin before anything is deleted.
    """

    MAX_BYTES: ClassVar[int] = MAX_LEASE_BYTES
    FORMAT: ClassVar[int] = FORMAT

    format: int
    attempt: str
    holder: str
    seconds: float | None
    beat: int = 0
    since: float = 0.0
    note: str = ""
    holds: bool = False

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        if self.seconds is None:
            if self.beat:
                yield "it has no end, and has been renewed"
            return
        if not 0 < self.seconds <= MAX_LEASE_SECONDS:
            yield f"it counts for {self.seconds:g} s, and {MAX_LEASE_SECONDS:g} is the most"
        if self.beat < 0:
            yield f"it has been renewed {self.beat} times"
        if self.since or self.note or self.holds:
            yield "it has an end, and says what only a pin says"
