"""A reader's claim on a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from distckpt.format.json.sealed import Sealed

FORMAT = 1
MAX_LEASE_BYTES = 64 << 10


class Lease(Sealed, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``holder`` reads ``attempt`` until ``expires`` (epoch seconds) at the latest; renewed while it works.

    Without an end (None) it is a pin: made at ``since``, with a ``note`` that says why, it counts until it is taken
    away. It ``holds`` once its maker has found the attempt alive in the log after the pin was written: who retires it
    from then on finds the pin before anything is deleted.
    """

    MAX_BYTES: ClassVar[int] = MAX_LEASE_BYTES

    format: int
    attempt: str
    holder: str
    expires: float | None
    since: float = 0.0
    note: str = ""
    holds: bool = False

    def counts(self, now: float) -> bool:
        """Whether it keeps the attempt from being deleted at ``now`` (epoch seconds)."""
        return self.expires is None or self.expires > now

    def problems(self) -> Iterator[str]:
        """See Sealed."""
        if self.expires is not None and (self.since or self.note or self.holds):
            yield "it has an end, and says what only a pin says"
