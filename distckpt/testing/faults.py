"""What can go wrong with a call to a store, who decides that it does, and the history of what was done."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

Operation = Literal[
    "put_if_absent", "put_unique", "replace", "delete", "read", "open", "read_into", "stat", "list", "folders", "sweep"
]
Outcome = Literal["pending", "done", "refused", "failed"]

WRITES: tuple[Operation, ...] = ("put_if_absent", "put_unique", "replace")


class Fault(Enum):
    """What goes wrong with one call. Faults that make no sense for an operation act as BEFORE."""

    BEFORE = "StorageError; nothing was done"
    FULL = "StorageFullError; nothing was done"
    NO_ANSWER = "StoreOutcomeUnknownError; nothing was done, nor will be"
    LATE = "StoreOutcomeUnknownError; it is done just before the next call"
    LOST_ANSWER = "StoreOutcomeUnknownError, although it was done"
    LOST_ANSWER_AS_REFUSAL = "AlreadyExistsError, although this very call did it, as after a silent retry"
    REFUSED = "AlreadyExistsError, although there is nothing, as from a client that takes a 409 or 412 at its word"
    TORN = "StorageError; half of the object is there"
    SHORT = "half of the content, as if that were all; DamagedError where it was known how much there is"
    FLIPPED = "the content with one bit changed"
    DELAYED = "done, after a while"
    GONE = "StorageError, now and for every later call, as if this process were cut off or dead"
    NO_MEMORY = "MemoryError; nothing was done"


_EVERY = (Fault.BEFORE, Fault.DELAYED, Fault.GONE)
_UNCLEAR = (Fault.FULL, Fault.NO_ANSWER, Fault.LOST_ANSWER)
_MORE: Mapping[Operation, tuple[Fault, ...]] = {
    "put_if_absent": (*_UNCLEAR, Fault.LATE, Fault.LOST_ANSWER_AS_REFUSAL, Fault.REFUSED),
    "put_unique": (*_UNCLEAR, Fault.LOST_ANSWER_AS_REFUSAL, Fault.REFUSED, Fault.TORN),
    "replace": (*_UNCLEAR, Fault.LATE),
    "delete": (Fault.NO_ANSWER, Fault.LOST_ANSWER, Fault.LATE),
    "read": (Fault.SHORT, Fault.FLIPPED),
    "read_into": (Fault.SHORT, Fault.FLIPPED),
}


def faults_of(operation: Operation) -> tuple[Fault, ...]:
    """The faults of a store that make a difference to an operation. NO_MEMORY, which every operation may meet, is none."""
    return (*_EVERY, *_MORE.get(operation, ()))


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as it was asked for and as it went.

    ``index`` counts calls from 0, and ``nth`` those of this operation on this path. ``applied`` says whether the store
    underneath has done it (for a torn write: half of it). ``size`` is in bytes, of what was to be written.
    ``outcome`` is what the caller was told: refused means AlreadyExistsError.
    """

    index: int
    operation: Operation
    path: str
    nth: int
    size: int | None = None
    fault: Fault | None = None
    applied: bool = False
    outcome: Outcome = "pending"


class Script(Protocol):
    """Decides which calls go wrong. Called once for each call, under a lock, in the order of the calls."""

    def fault(self, call: Call) -> Fault | None:
        """What goes wrong with this call, or None."""


@dataclass(frozen=True, slots=True)
class NoFaults:
    """Nothing goes wrong."""

    def fault(self, call: Call) -> Fault | None:
        """None."""
        return None


@dataclass(frozen=True, slots=True)
class FaultAt:
    """One call goes wrong, the one with that index."""

    index: int
    kind: Fault

    def fault(self, call: Call) -> Fault | None:
        """The fault, at its index."""
        return self.kind if call.index == self.index else None


@dataclass(frozen=True, slots=True)
class FaultOn:
    """The ``nth`` call (from 0) of one operation on each path that begins with ``path`` goes wrong."""

    operation: Operation
    kind: Fault
    path: str = ""
    nth: int = 0

    def fault(self, call: Call) -> Fault | None:
        """The fault, if the call is one of those meant."""
        is_meant = call.operation == self.operation and call.path.startswith(self.path) and call.nth == self.nth
        return self.kind if is_meant else None


@dataclass(frozen=True, slots=True)
class RandomFaults:
    """Each call goes wrong with probability ``rate``, in one of ``kinds`` as far as they apply to its operation.

    What happens to a call depends on ``seed``, its operation, path and ``nth`` alone, not on how threads interleave.
    """

    seed: int
    rate: float
    kinds: tuple[Fault, ...] = tuple(kind for kind in Fault if kind is not Fault.GONE)

    def fault(self, call: Call) -> Fault | None:
        """A fault, or luck."""
        dice = random.Random(f"{self.seed}/{call.operation}/{call.path}/{call.nth}")
        kinds = [kind for kind in self.kinds if kind in faults_of(call.operation)]
        return dice.choice(kinds) if kinds and dice.random() < self.rate else None


def rewritten(
    calls: Sequence[Call], mutable: Sequence[str] = ("checkpoint", "_leases/", "_stats/")
) -> tuple[Call, ...]:
    """The writes that were done to a path which an earlier call had written, deleted since or not.

    Paths that begin with one of ``mutable`` may change. No call may be left over in the history of a run: no object
    is ever written twice.
    """
    written: set[str] = set()
    again: list[Call] = []
    for call in calls:
        if call.operation not in WRITES or not call.applied or call.path.startswith(tuple(mutable)):
            continue
        if call.path in written:
            again.append(call)
        written.add(call.path)
    return tuple(again)
