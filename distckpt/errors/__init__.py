"""Every error that distckpt raises on purpose.

- DistckptError
  - StorageError                  a store refused or failed an operation on one object
    - AlreadyExistsError          put-if-absent lost: the name is taken
    - BlockedError                a link, a pipe or a folder in a file's place, or a file in a folder's: in the way of a write
      - AccessDeniedError         this process lacks the right to do that, or nobody has it
    - ObjectNotFoundError         also a FileNotFoundError
    - StorageFullError            no space left, or a quota
    - StoreOutcomeUnknownError    the store answered neither yes nor no; the write may have happened
    - StoreUnsuitableError        the probe found that the store cannot keep our promises
  - DamagedError                  bytes on storage are not what was written: truncated, flipped, missing, forged
    - UnsupportedFormatError      a format version that this release does not read
    - LogMissingError             checkpoints in a directory that has no log: copied there, or the log was deleted
    - StateFileError              also a ValueError: a state file that names no newest checkpoint
  - CheckpointNotFoundError       also a FileNotFoundError: no committed checkpoint answers to that name
  - DataElsewhereError            the shards of a checkpoint are in another place, which was not given, or wrongly
  - ForeignError                  files of another program hold what only unpickling could make
  - LeaseLostError                a lease could not be renewed in time, so what is being read may be deleted meanwhile
  - SaveError                     one save failed on every rank; the previous checkpoint stands
    - EncodeError                 also a TypeError: a value that cannot be stored without pickle
    - PlanError                   a hole, an overlap, or ranks that disagree
    - MissingRanksError           ranks that did not come, or fell silent, before the deadline
    - RankFailedError             a rank reported that its part failed
    - NotSharedError              shards that the coordinator cannot see: the directory is not shared
    - NumberMismatchError         ranks that save different numbers
    - CommitUnknownError          the log entry may or may not be on storage; it is being retried
    - UnreadableError             what it would write, the log entry say, no reader would take: too large, or impossible
  - CoordinatorError
    - FencedError                 a newer coordinator owns the directory; this one has stopped for ever
    - StaleRunError               a newer incarnation of the job has started
    - DirectoryLostError          the directory is not the one in which this run began: deleted, unmounted, replaced
    - CoordinatorUnavailableError no answer from the coordinator in time
    - CoordinatorFailedError      an exception inside the coordinator, which starts again from the log
    - AbsentRanksError            ranks that did not come when all make a manager together
    - PeerFailedError             another rank reported an error, so all ranks stop
      - RankSilentError           a rank gave no sign of life for too long, so all ranks stop
  - LaunchError                   also a ValueError: there are more ranks than this one, and no way to find them
  - AgreementError                ranks that should decide together do not: one has died, left, or is elsewhere
  - OutOfRangeError               an input has come to its end: a clean stop, not a failure
  - GroupError                    a group of workers that share the checkpoints of a run
    - GroupMismatchError          also a ValueError: the group was made with other settings
    - GroupNotFoundError          there is no group of that name
    - ClaimLostError              another worker has taken over, so what this one did does not count
  - ExportError                   a committed checkpoint could not be exported; the checkpoint stands
  - RestoreError
    - MismatchError               keys missing, unexpected or of another shape
    - ResizeError                 per-rank state, another world size, and no rule that says what to do
    - NoGoodCheckpointError       every candidate was refused; carries the reason for each

All of them survive pickling between processes with their fields.
"""

from __future__ import annotations

from distckpt.errors.base import (
    DistckptError,
    ranks_at_hosts,
)
from distckpt.errors.reading import (
    ClaimLostError,
    ForeignError,
    GroupError,
    GroupMismatchError,
    GroupNotFoundError,
    LeaseLostError,
    MismatchError,
    NoGoodCheckpointError,
    ResizeError,
    RestoreError,
)
from distckpt.errors.running import (
    AbsentRanksError,
    AgreementError,
    CoordinatorError,
    CoordinatorFailedError,
    CoordinatorUnavailableError,
    DirectoryLostError,
    FencedError,
    LaunchError,
    OutOfRangeError,
    PeerFailedError,
    RankSilentError,
    StaleRunError,
)
from distckpt.errors.saving import (
    CommitUnknownError,
    EncodeError,
    ExportError,
    MissingRanksError,
    NotSharedError,
    NumberMismatchError,
    PlanError,
    RankFailedError,
    SaveError,
    UnreadableError,
)
from distckpt.errors.storage import (
    AccessDeniedError,
    AlreadyExistsError,
    BlockedError,
    CheckpointNotFoundError,
    DamagedError,
    DataElsewhereError,
    LogMissingError,
    ObjectNotFoundError,
    StateFileError,
    StorageError,
    StorageFullError,
    StoreOutcomeUnknownError,
    StoreUnsuitableError,
    UnsupportedFormatError,
)

__all__ = [
    "AbsentRanksError",
    "AccessDeniedError",
    "AgreementError",
    "AlreadyExistsError",
    "BlockedError",
    "CheckpointNotFoundError",
    "ClaimLostError",
    "CommitUnknownError",
    "CoordinatorError",
    "CoordinatorFailedError",
    "CoordinatorUnavailableError",
    "DamagedError",
    "DataElsewhereError",
    "DirectoryLostError",
    "DistckptError",
    "EncodeError",
    "ExportError",
    "FencedError",
    "ForeignError",
    "GroupError",
    "GroupMismatchError",
    "GroupNotFoundError",
    "LaunchError",
    "LeaseLostError",
    "LogMissingError",
    "MismatchError",
    "MissingRanksError",
    "NoGoodCheckpointError",
    "NotSharedError",
    "NumberMismatchError",
    "ObjectNotFoundError",
    "OutOfRangeError",
    "PeerFailedError",
    "PlanError",
    "RankFailedError",
    "RankSilentError",
    "ResizeError",
    "RestoreError",
    "SaveError",
    "StaleRunError",
    "StateFileError",
    "StorageError",
    "StorageFullError",
    "StoreOutcomeUnknownError",
    "StoreUnsuitableError",
    "UnreadableError",
    "UnsupportedFormatError",
    "ranks_at_hosts",
]
