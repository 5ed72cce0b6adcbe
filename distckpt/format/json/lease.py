"""A reader's claim on a checkpoint."""

from __future__ import annotations

import msgspec

FORMAT = 1
MAX_LEASE_BYTES = 64 << 10


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``holder`` reads ``attempt`` until ``expires`` (epoch seconds) at the latest; renewed while it works."""

    format: int
    attempt: str
    holder: str
    expires: float
