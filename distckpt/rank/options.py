"""How a rank saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SaverOptions:
    """What does not change from save to save.

    ``name`` is the first part of a checkpoint's folder; ``timeout`` is the seconds until a missing rank fails a save;
    ``buffers`` saves may be in the making at once, and one too many waits, or is left out by all ranks with
    ``skip_if_busy``; ``verify`` reads every shard back before it is reported; ``check_copies`` compares what
    several ranks hold at every save; ``failures_allowed`` saves in a row may fail while training goes on; ``shown``
    has rank 0 show on its terminal how far the first save has come.
    """

    rank: int
    world_size: int
    name: str
    timeout: float
    buffers: int
    skip_if_busy: bool
    verify: bool
    check_copies: bool
    failures_allowed: int = 0
    shown: bool = False
