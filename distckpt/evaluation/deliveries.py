"""What a source of checkpoints hands out, and how that is settled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distckpt.directory.lease import HeldLease
from distckpt.format.json.log import CheckpointRecord


class Settlement(Protocol):
    """What becomes of a delivery in the end. Each says whether it still was ours to settle."""

    def ack(self) -> bool:
        """It is done."""

    def release(self) -> bool:
        """Somebody else is to have it."""

    def reject(self, error: str) -> bool:
        """It failed."""


class Unclaimed:
    """Of what nobody has a claim on there is nothing to settle."""

    def ack(self) -> bool:
        """See Settlement."""
        return True

    def release(self) -> bool:
        """See Settlement."""
        return True

    def reject(self, error: str) -> bool:
        """See Settlement."""
        return True


@dataclass(frozen=True, slots=True)
class Delivery:
    """A checkpoint that this process holds a lease on, given out for the ``count``-th time."""

    record: CheckpointRecord
    lease: HeldLease
    count: int
    settlement: Settlement


class Source(Protocol):
    """Where a watch gets checkpoints from."""

    @property
    def worker(self) -> str:
        """Who gets them, for people."""

    def get(self) -> Delivery | None:
        """The next one; None if there is none now. Raises what reading the log and taking a lease raise."""

    def is_drained(self) -> bool:
        """Whether none will come any more, as far as the last look showed: the run is over, and nothing is left."""

    def pause(self) -> float:
        """For how many seconds nothing comes but by what the log says."""
