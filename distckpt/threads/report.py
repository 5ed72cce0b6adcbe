"""What one rank tells the others of its stop: a request, or the likeness of its error."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

from distckpt.errors import PeerFailedError, RankSilentError

MOST_TEXT = 1 << 16


@dataclass(frozen=True, slots=True)
class StopReport:
    """Why everyone stops: ``rank`` on ``host`` asked for it, failed, or was not heard of for ``silent`` seconds.

    Of an error ``kind`` is the class's name ('' if there is none), ``kinds`` are the full names of the class and its
    bases, ``reason`` is its text.
    """

    rank: int
    host: str
    kind: str = ""
    kinds: tuple[str, ...] = ()
    reason: str = ""
    traceback_text: str = field(default="", repr=False)
    silent: float | None = None

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host})" if self.host else f"rank {self.rank}"
        return f"{who} failed with {self.kind}: {self.reason}" if self.kind else f"{who} has requested a stop"


def report_of(rank: int, host: str, error: BaseException | None) -> StopReport:
    """What other ranks are told: a request to stop, or the likeness of ``error``."""
    if error is None:
        return StopReport(rank, host)
    kinds = tuple(map(full_name, type(error).__mro__))
    text = "".join(traceback.format_exception(error))[-MOST_TEXT:]
    return StopReport(rank, host, type(error).__name__, kinds, text_of(error)[:MOST_TEXT], text)


def peer_error(report: StopReport) -> PeerFailedError:
    """What a rank raises that has heard of another one's failure."""
    if report.silent is not None:
        return RankSilentError(report.rank, report.host, report.silent)
    return PeerFailedError(report.rank, report.host, report.kind, report.reason, report.traceback_text)


def is_clean(report: StopReport, clean: Iterable[type[BaseException]]) -> bool:
    """Whether it means "done" rather than "failed". By name: the class that was raised on the other rank may not exist here."""
    return not report.kind or not {full_name(kind) for kind in clean}.isdisjoint(report.kinds)


def full_name(kind: type) -> str:
    """The name by which a class is recognized on other ranks."""
    return f"{kind.__module__}.{kind.__qualname__}"


def text_of(error: BaseException) -> str:
    """The error's own text."""
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - somebody else's __str__ must not keep the error from being told
        return f"(its text cannot be had: {type(broken).__name__})"
