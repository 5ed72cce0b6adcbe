"""Every error that distckpt raises on purpose.

- DistckptError
  - StorageError                  a store refused or failed an operation on one object
    - AlreadyExistsError          put-if-absent lost: the name is taken
    - BlockedError                a link, a pipe or a folder in a file's place, or a file in a folder's: in the way of a write
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

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def ranks_at_hosts(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """``rank 3 (host-1), rank 7 (host-2)``: the first 16 of them, with their hosts as far as they are known."""
    return _some([f"rank {rank} ({hosts[rank]})" if hosts.get(rank) else f"rank {rank}" for rank in ranks], most=16)


class DistckptError(Exception):
    """Base of every error that distckpt raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[DistckptError], args: tuple[Any, ...], fields: dict[str, Any]) -> DistckptError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class StorageError(DistckptError):
    """A store refused or failed an operation on the object at ``path``."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class AlreadyExistsError(StorageError):
    """Put-if-absent found the name taken; nothing was written."""

    def __init__(self, path: str, message: str = "exists already; nothing was written") -> None:
        super().__init__(path, message)


class BlockedError(StorageError):
    """What no store puts there is in the way of ``path``: a link, a pipe, a folder. Nothing was written, nor will be."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """There is no object at ``path``."""

    def __init__(self, path: str, message: str = "there is no such object") -> None:
        super().__init__(path, message)


class StorageFullError(StorageError):
    """The store has no room left for ``path``; what was written of it will be collected later."""


class StoreOutcomeUnknownError(StorageError):
    """The store answered neither yes nor no: the write to ``path`` may have happened or may still happen."""


class StoreUnsuitableError(StorageError):
    """The probe found that this store cannot keep the promises that a commit rests on."""


class DamagedError(DistckptError):
    """The bytes at ``path`` are not what was written. ``key`` names the tensor or value, if it is known."""

    def __init__(self, path: str, reason: str, key: str | None = None) -> None:
        where = f"{path}, key {key!r}" if key is not None else path
        super().__init__(f"{where}: {reason}")
        self.path, self.key, self.reason = path, key, reason


class UnsupportedFormatError(DamagedError):
    """``path`` has a format version that this release does not read; a newer distckpt may."""


class LogMissingError(DamagedError):
    """``directory`` has checkpoint ``folders`` but no log, so nobody knows which count. Nothing in it was changed."""

    def __init__(self, directory: str, folders: Sequence[str]) -> None:
        super().__init__(
            directory,
            f"it has no log, but checkpoints: {_some(folders)}. They were copied here, or _log was deleted. "
            f"Nothing was changed. Run `distckpt adopt {directory}`, which checks them and writes a log for those "
            f"that are whole; or restore one by its own path, such as {directory}/{folders[-1]}",
        )
        self.directory, self.folders = directory, tuple(folders)


class StateFileError(DamagedError, ValueError):
    """The state file at ``path`` names no newest checkpoint: it is empty, say. No checkpoint is lost by that."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path,
            "names no newest checkpoint (model_checkpoint_path), as if it were empty. The checkpoints are in the log, which "
            "latest_checkpoint reads: delete this file, and the next save writes it anew",
        )


class CheckpointNotFoundError(DistckptError, FileNotFoundError):
    """No committed checkpoint answers to ``path``."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class DataElsewhereError(DistckptError):
    """The shards of a checkpoint lie in another place than the directory, and not where they were looked for."""


class LeaseLostError(DistckptError):
    """A lease of ``seconds`` on ``attempt`` was not renewed in time: it may be deleted. What was read before is right."""

    def __init__(self, path: str, attempt: str, seconds: float) -> None:
        lost = f"the lease on {attempt} could not be renewed for {seconds:g} s"
        super().__init__(f"{path}: {lost}; it may be deleted, so no more is read. Open it again, if it is still there")
        self.path, self.attempt, self.seconds = path, attempt, seconds


class SaveError(DistckptError):
    """The save of checkpoint ``number`` failed on every rank. The previous checkpoint stands."""

    def __init__(self, number: int | None, message: str) -> None:
        what = f"checkpoint {number} was not saved" if number is not None else "the save was not prepared"
        super().__init__(f"{what}: {message}")
        self.number = number


class EncodeError(SaveError, TypeError):
    """The value at ``key`` cannot be stored without pickle, so it is refused before anything is written."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(None, f"{key}: {message}")
        self.key = key


class PlanError(SaveError):
    """What the ranks hold does not add up to whole tensors. ``key`` and ``ranks`` say where."""

    def __init__(self, number: int | None, key: str, ranks: Sequence[int], message: str) -> None:
        super().__init__(number, f"{key} (ranks {_some(list(map(str, ranks)), most=16)}): {message}")
        self.key = key
        self.ranks = tuple(ranks)


class MissingRanksError(SaveError):
    """``ranks`` did not come, or did not report their shards, within ``timeout`` seconds; of a restore too."""

    def __init__(
        self, number: int | None, ranks: Sequence[int], hosts: Mapping[int, str], timeout: float, stage: str
    ) -> None:
        waited = f"waited {timeout:g} s for {ranks_at_hosts(ranks, hosts)} {stage}. Every rank must call"
        if stage == "to restore":
            advice = "restore or restore_or_initialize, all alike; restore again before training goes on"
            DistckptError.__init__(self, f"nothing was restored: {waited} {advice}")
            self.number = number
        else:
            what = "save, with the same number and at the same step" if number is not None else "prepare"
            advice = "Nothing was committed; training may go on and the next save starts afresh"
            super().__init__(number, f"{waited} {what}. {advice}")
        self.ranks = tuple(ranks)
        self.hosts = dict(hosts)
        self.timeout = timeout
        self.stage = stage


class RankFailedError(SaveError):
    """``rank`` on ``host`` reported that its own part of the save failed; ``reason`` is its own error's text."""

    def __init__(self, number: int | None, rank: int, host: str, reason: str) -> None:
        super().__init__(number, f"{ranks_at_hosts([rank], {rank: host})} failed: {reason}")
        self.rank = rank
        self.host = host
        self.reason = reason


class NotSharedError(SaveError):
    """Shards that ranks wrote cannot be seen by the coordinator: the directory is not shared between the hosts."""

    def __init__(self, number: int | None, directory: str, ranks: Sequence[int], hosts: Mapping[int, str]) -> None:
        super().__init__(
            number,
            f"shards of {ranks_at_hosts(ranks, hosts)} are not to be seen in {directory} from the coordinator. "
            "Use a directory that all hosts share",
        )
        self.directory = directory
        self.ranks = tuple(ranks)
        self.hosts = dict(hosts)


class NumberMismatchError(SaveError):
    """Ranks save different checkpoint numbers at the same time; ``numbers`` maps rank to number, None for a prepare."""

    def __init__(
        self, number: int | None, numbers: Mapping[int, int | None], hosts: Mapping[int, str] | None = None
    ) -> None:
        shown = ", ".join(
            f"{ranks_at_hosts([rank], hosts or {})} {f'saves {value}' if value is not None else 'only prepares'}"
            for rank, value in sorted(numbers.items())[:16]
        )
        super().__init__(
            number,
            f"all ranks must save the same number, but {shown}. Every rank must call save, and at the same steps; if it "
            "counts by itself, give numbers, or set checkpoint.save_counter alike on all ranks. The next save starts afresh",
        )
        self.numbers = dict(numbers)
        self.hosts = dict(hosts or {})


class CommitUnknownError(SaveError):
    """The store has not said whether the log entry was written. The coordinator goes on asking; delete nothing."""


class UnreadableError(SaveError):
    """What the save would have written, no reader would take: ``reason`` says why not, and what to do."""

    def __init__(self, number: int | None, reason: str) -> None:
        super().__init__(number, f"{reason}. Nothing was committed, and training may go on")
        self.reason = reason


class CoordinatorError(DistckptError):
    """The coordinator of a directory cannot serve this rank."""


class FencedError(CoordinatorError):
    """A coordinator of epoch ``newer`` owns ``directory``; the one of ``epoch`` has stopped for ever, harmlessly."""

    def __init__(self, directory: str, epoch: int, newer: int) -> None:
        super().__init__(
            f"{directory}: the coordinator of epoch {epoch} was replaced by epoch {newer}. "
            "Another manager saves to this directory now; this one must stop"
        )
        self.directory, self.epoch, self.newer = directory, epoch, newer


class StaleRunError(CoordinatorError):
    """This rank belongs to incarnation ``run`` of the job, and ``newer`` has started since."""

    def __init__(self, directory: str, run: int, newer: int) -> None:
        super().__init__(
            f"{directory}: this process belongs to run {run} of the job, and run {newer} has started since. "
            "It can neither save nor retire anything any more; let it end"
        )
        self.directory, self.run, self.newer = directory, run, newer


class DirectoryLostError(CoordinatorError):
    """``directory`` is not that of incarnation ``run`` any more: its log, which knows ``found`` runs, is another one."""

    def __init__(self, directory: str, run: int, found: int) -> None:
        super().__init__(
            f"{directory}: this process belongs to run {run} of a job, and the log that is there now "
            f"{f'is another one, of {found} runs' if found else 'knows of none'}. The directory was deleted or unmounted, or "
            "another is in its place. Nothing was written there. Saves go on once it is back; else start the job again"
        )
        self.directory, self.run, self.found = directory, run, found


class CoordinatorUnavailableError(CoordinatorError):
    """No answer from the coordinator in time. What it had committed is on storage; nothing is lost."""


class CoordinatorFailedError(CoordinatorError):
    """An exception inside the coordinator of ``directory``, for ``reason``. What it had committed is on storage."""

    def __init__(self, directory: str, reason: str) -> None:
        super().__init__(
            f"{directory}: the coordinator failed with {reason}. It starts again from the log: what was committed stands, "
            "what was under way has failed unless it comes up as committed, and the next save starts afresh"
        )
        self.directory = directory
        self.reason = reason


class AbsentRanksError(CoordinatorError):
    """``ranks`` did not come within ``timeout`` seconds where all ranks must make a manager together."""

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        super().__init__(
            f"waited {timeout:g} s for {ranks_at_hosts(ranks, {})} to come. Every rank must make the manager, and all of "
            "them alike; nothing was changed, and they may try again together"
        )
        self.ranks = tuple(ranks)
        self.timeout = timeout


class PeerFailedError(CoordinatorError):
    """``rank`` on ``host`` reported an error of class ``kind``, the first of all ranks, so this rank stopped too.

    ``reason`` is that error's own text, ``traceback_text`` its traceback as that rank would have printed it; from
    Python 3.11 on it is also a note of this error, so that it is printed with it.
    """

    def __init__(self, rank: int, host: str, kind: str, reason: str, traceback_text: str) -> None:
        super().__init__(f"{ranks_at_hosts([rank], {rank: host})} failed with {kind}: {reason}")
        self.rank = rank
        self.host = host
        self.kind = kind
        self.reason = reason
        self.traceback_text = traceback_text
        if traceback_text and sys.version_info >= (3, 11):
            self.add_note(f"On rank {rank} ({host}):\n{traceback_text}")


class RankSilentError(PeerFailedError):
    """``rank`` on ``host`` gave no sign of life for ``seconds``: it was killed, hangs, or cannot be reached."""

    def __init__(self, rank: int, host: str, seconds: float) -> None:
        super().__init__(rank, host, type(self).__name__, f"no sign of life for {seconds:.3g} s", "")
        self.args = (f"{ranks_at_hosts([rank], {rank: host})} gave {self.reason}",)
        self.seconds = seconds


class LaunchError(DistckptError, ValueError):
    """There are more ranks than this one, with no way to find each other or to be told from those of an earlier start."""


class AgreementError(DistckptError):
    """The ranks could not decide together: one has died or left the training loop, or runs another step."""


class OutOfRangeError(DistckptError):
    """An input has come to its end. A Coordinator takes it for a clean stop."""


class GroupError(DistckptError):
    """A group of workers that share the checkpoints of a run."""


class GroupMismatchError(GroupError, ValueError):
    """``group`` of ``directory`` has other settings; ``settings`` maps each to what it is, and what was wanted."""

    def __init__(self, directory: str, group: str, settings: Mapping[str, tuple[object, object]]) -> None:
        shown = ", ".join(f"{name} is {theirs!r} and not {wanted!r}" for name, (theirs, wanted) in settings.items())
        super().__init__(
            f"{directory}: the group {group!r} works with other settings: {shown}. All its workers must agree: leave these "
            "out, which takes them as they are, or use another group"
        )
        self.directory, self.group, self.settings = directory, group, dict(settings)


class GroupNotFoundError(GroupError):
    """There is no ``group`` of that name in ``directory``."""

    def __init__(self, directory: str, group: str) -> None:
        super().__init__(f"{directory}: there is no group {group!r}. The first of its workers makes it")
        self.directory, self.group = directory, group


class ClaimLostError(GroupError):
    """The claim on the checkpoint at ``path`` is another worker's of ``group`` by now, or was settled: this does not count."""

    def __init__(self, path: str, group: str, delivery: int) -> None:
        super().__init__(
            f"{path}: delivery {delivery} to the group {group!r} has no claim any more: its lease was not renewed in time, and "
            "another worker took over, or it was settled before. What was done here does not count, and that of the other does"
        )
        self.path, self.group, self.delivery = path, group, delivery


class ExportError(DistckptError):
    """Checkpoint ``number`` stands, but it could not be exported; ``module`` failed ('' if none did), for ``reason``."""

    def __init__(self, number: int, module: str, reason: str) -> None:
        which = f", module {module!r}," if module else ""
        super().__init__(f"checkpoint {number}{which} was not exported: {reason}")
        self.number = number
        self.module = module
        self.reason = reason


class RestoreError(DistckptError):
    """A restore could not be done."""


class MismatchError(RestoreError):
    """The checkpoint at ``path`` and the objects do not hold the same keys, or keys that do not fit.

    ``missing`` and ``misshaped`` list the first ones only where many ranks restore; the counts are of all.
    """

    def __init__(
        self,
        path: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, str],
        missing_count: int = 0,
        misshaped_count: int = 0,
    ) -> None:
        parts = []
        if missing:
            parts.append(f"not in the checkpoint: {_some(missing, missing_count)}")
        if unexpected:
            parts.append(f"in the checkpoint, but in no object: {_some(unexpected)}")
        if misshaped:
            texts = _some([f"{key} ({text})" for key, text in misshaped.items()], misshaped_count)
            parts.append(f"on both sides, but not fitting: {texts}")
        super().__init__(f"{path}: " + "; ".join(parts))
        self.path = path
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), dict(misshaped)
        self.missing_count = max(missing_count, len(self.missing))
        self.misshaped_count = max(misshaped_count, len(self.misshaped))


def _some(names: Sequence[str], count: int = 0, most: int = 8) -> str:
    more = max(count, len(names)) - most
    return ", ".join(list(names)[:most]) + (f" and {more} more" if more > 0 else "")


class ResizeError(RestoreError):
    """``key`` holds one value a rank, ``saved`` ranks wrote it, ``now`` ranks run, and on_resize is "error"."""

    def __init__(self, key: str, saved: int, now: int) -> None:
        super().__init__(
            f"{key}: per-rank state of {saved} ranks cannot be restored on {now} ranks. "
            'Say what to do with PerRank(..., on_resize="drop") or a callable'
        )
        self.key, self.saved, self.now = key, saved, now


class NoGoodCheckpointError(RestoreError):
    """Every candidate in ``directory`` was refused; ``refused`` pairs each path with the reason.

    ``spoiled``: tensors of the objects hold parts of a refused one. If not, nothing has been changed.
    """

    def __init__(self, directory: str, refused: Sequence[tuple[str, str]], spoiled: bool = False) -> None:
        listing = "; ".join(f"{path}: {reason}" for path, reason in refused)
        advice = "make the objects anew, or restore something that has all their keys"
        left = f". Tensors of the objects now hold parts of what was refused: {advice}" if spoiled else ""
        super().__init__(f"{directory}: no checkpoint could be restored. {listing}{left}")
        self.directory, self.refused, self.spoiled = directory, tuple(refused), spoiled
