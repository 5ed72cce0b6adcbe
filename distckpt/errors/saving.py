"""Errors of saves, and of what is made of a saved checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distckpt.errors.base import DistckptError, ranks_at_hosts, some


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
        super().__init__(number, f"{key} (ranks {some(list(map(str, ranks)), most=16)}): {message}")
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


class ExportError(DistckptError):
    """Checkpoint ``number`` stands, but it could not be exported; ``module`` failed ('' if none did), for ``reason``."""

    def __init__(self, number: int, module: str, reason: str) -> None:
        which = f", module {module!r}," if module else ""
        super().__init__(f"checkpoint {number}{which} was not exported: {reason}")
        self.number = number
        self.module = module
        self.reason = reason
