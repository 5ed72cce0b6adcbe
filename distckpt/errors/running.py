"""Errors of ranks that run together, and of their coordinator."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distckpt.errors.base import DistckptError, ranks_at_hosts


class CoordinatorError(DistckptError):
    """The coordinator of a directory cannot serve this rank."""


class FencedError(CoordinatorError):
    """A coordinator of epoch ``newer`` owns ``directory``; the one of ``epoch`` has stopped for ever, harmlessly."""

    def __init__(self, directory: str, epoch: int, newer: int) -> None:
        super().__init__(
            f"{directory}: the coordinator of epoch {epoch} was replaced by epoch {newer}. "
            "Another manager saves to this directory now, or a command such as `distckpt rm --force` has changed its log; "
            "this one must stop"
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
