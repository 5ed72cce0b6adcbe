"""A reader's claim on a checkpoint."""

from __future__ import annotations

from typing import ClassVar

from distckpt.format.json.sealed import Sealed

FORMAT = 1
MAX_LEASE_BYTES = 64 << 10


class Lease(Sealed, frozen=True, forbid_unknown_fields=True):
    """``holder`` reads ``attempt`` until ``expires`` (epoch seconds) at the latest; renewed while it works."""

    MAX_BYTES: ClassVar[int] = MAX_LEASE_BYTES

    format: int
    attempt: str
    holder: str
    expires: float
