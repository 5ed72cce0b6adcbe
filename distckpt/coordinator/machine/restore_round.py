"""One restore of all ranks: which checkpoint is tried, what is wanted of the ranks, and what comes of it.

Each candidate goes through three stages. First every rank says how its objects match it, which changes nothing; only if
that will do for all of them, they read it, which fills tensors where they are; and only once all have read all of it,
and every byte was good, they hand it to everything else. So what a refused candidate has touched, the next one fills.
Knows neither time nor how ranks are reached: the coordinator has rounds, and so have ranks that can consult each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distckpt.coordinator.machine.records import find_folder, find_number, record_path
from distckpt.coordinator.messages import (
    FillFrom,
    FinishWith,
    KeyMatch,
    MatchWith,
    Mismatched,
    Refused,
    Reply,
    Restore,
    Restored,
    RestoreStage,
    merged_matches,
)
from distckpt.errors import CheckpointNotFoundError, DistckptError, NoGoodCheckpointError, RestoreError
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.format.json.page import PageRef
from distckpt.format.names import attempt_age, parse_checkpoint


@dataclass(slots=True, eq=False)
class RestoreRound:
    """``candidates`` are what is left to try, best first; its first element is being tried. None: nothing is there.

    ``state`` has what the round may need at hand (``pages_for``). If it falls back further than the entry goes,
    ``wants_pages`` says so, and ``extend`` is to be called with all that can be read of them. ``lost`` says why pages
    cannot be read that may have what is wanted.
    ``name`` is the run's own, ``label`` tells this round from others.

    ``keys`` is how those ranks match it that have said so. ``reported`` are ranks that are through with this ``stage``,
    ``refusal`` the first reason against the candidate. ``spoiled`` says that a refused one has been read in part.
    """

    directory: str
    world_size: int
    which: int | str | None
    partial: bool
    name: str
    state: State
    lost: tuple[DistckptError, ...] = ()
    candidates: list[CheckpointRecord] = field(default_factory=list)
    keys: KeyMatch | None = None
    stage: RestoreStage = "match"
    spoiled: bool = False
    refused: tuple[tuple[str, str], ...] = ()
    reported: set[int] = field(default_factory=set)
    refusal: str = ""
    outcome: Reply | None = None
    label: str = ""
    wants_pages: bool = False
    older: frozenset[str] | None = None
    tried: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.candidates = self._wanted(self.state)

    @property
    def current(self) -> CheckpointRecord:
        """What is being tried."""
        return self.candidates[0]

    @property
    def question(self) -> Reply:
        """What is wanted of ranks that have not reported yet."""
        if self.stage == "finish" and self.keys is not None:
            return FinishWith(self.current, self.keys, self.label)
        if self.stage == "fill":
            return FillFrom(self.current, self.label)
        return MatchWith(self.current, self.refused, self.label)

    @property
    def is_complete(self) -> bool:
        """Whether every rank has reported on what is wanted, and the round is to go on."""
        return self.outcome is None and not self.wants_pages and len(self.reported) == self.world_size

    @property
    def rests_on_log(self) -> bool:
        """Whether the outcome is as it is because of what the log has."""
        match self.outcome:
            case Restored() | Refused(CheckpointNotFoundError() | NoGoodCheckpointError()):
                return True
        return False

    def hear(self, rank: int, host: str, message: Restore) -> bool:
        """A rank wants to restore, or says what came of what was wanted: whether that was news."""
        reason = self._disagreement(rank, message)
        if message.failed:
            reason = f"rank {rank} ({host}) failed: {message.failed}"
        if reason:
            self.outcome = Refused(RestoreError(f"{self.directory}: {reason}"))
            return False
        if rank in self.reported or not self._is_answer(message):
            return False
        self.reported.add(rank)
        if message.refused and not self.refusal:
            self.refusal = f"rank {rank} ({host}): {message.refused}"
        elif message.keys is not None and self.stage == "match":
            self.keys = message.keys if self.keys is None else merged_matches(self.keys, message.keys)
        return True

    def advance(self, state: State) -> None:
        """All ranks have reported: to the next stage, the next candidate, or the end. ``state`` is what there is now."""
        if not self.candidates:
            self.outcome = self._nothing()
        elif self.refusal:
            self._fall_back(state)
        elif self.stage == "finish":
            self.outcome = Restored(self.current, self.refused, self.label)
        elif self.keys is not None and (self.keys.in_vain or not (self.partial or self.keys.fits)):
            self.outcome = Mismatched(self.current, self.keys)
        else:
            self._begin("fill" if self.stage == "match" else "finish")

    def _wanted(self, state: State) -> list[CheckpointRecord]:
        if self.which is None:
            return list(_newest_at_hand(state))
        if isinstance(self.which, str):
            record = find_folder(state, self.which)
        else:
            record = find_number(state, self.which, self.name)
        return [record] if record is not None else []

    def _nothing(self) -> Reply:
        if self.which is None:
            return Restored(None, (), self.label)
        path = f"{self.directory}/{self.which if isinstance(self.which, str) else f'{self.name}-{self.which}'}"
        return Refused(next(iter(self.lost), CheckpointNotFoundError(path, "no such checkpoint is committed")))

    def _is_answer(self, message: Restore) -> bool:
        """Whether a rank reports on what is wanted now, and not on an earlier candidate, stage or round."""
        if not self.candidates:
            return True
        if (message.round, message.tried, message.stage) != (self.label, self.current.attempt, self.stage):
            return False
        return self.stage != "match" or bool(message.refused) or message.keys is not None

    def _begin(self, stage: RestoreStage) -> None:
        """Nobody has reported on what is wanted from now on."""
        self.stage = stage
        self.reported = set()

    def _fall_back(self, state: State) -> None:
        self.tried.add(self.current.attempt)
        refused = (record_path(self.directory, self.current), self.refusal)
        self.refused = (*self.refused, refused)
        self.refusal = ""
        self.keys = None
        self.spoiled |= self.stage != "match"
        # What an older one lacks keeps what was there before: so it must not have been touched.
        is_last = self.stage == "finish" or (self.partial and self.spoiled)
        self._begin("match")
        # Retention may have taken older ones away meanwhile: it opens their pages first.
        alive, retiring = state.alive(), {record.attempt for record in state.retiring}
        paged = (self.older or frozenset()) - retiring
        left = [record for record in self.candidates[1:] if record.attempt in alive or record.attempt in paged]
        self._go_on_with([] if is_last else left, may_extend=not is_last)

    def extend(self, state: State, lost: Sequence[str]) -> None:
        """Older candidates are known: those of ``state``. ``lost`` says which pages could not be read, and why."""
        self.wants_pages = False
        self.refused = (*self.refused, *((self.directory, reason) for reason in lost))
        found = [record for record in state.newest_first() if record.attempt not in self.tried]
        self.older = frozenset(record.attempt for record in found)
        self._go_on_with(found, may_extend=False)

    def _go_on_with(self, left: list[CheckpointRecord], *, may_extend: bool) -> None:
        self.candidates = left
        if not left and may_extend and self.which is None and self.state.pages and self.older is None:
            self.wants_pages = True
        elif not left:
            self.outcome = Refused(NoGoodCheckpointError(self.directory, self.refused, self.spoiled))

    def _disagreement(self, rank: int, message: Restore) -> str:
        if message.which != self.which:
            return f"rank {rank} restores {_shown(message.which)}, but others restore {_shown(self.which)}"
        if message.partial != self.partial:
            mine, others = ("partial", "strict") if message.partial else ("strict", "partial")
            return (
                f"the restore of rank {rank} is {mine}, that of others {others}: all ranks must give the same partial"
            )
        return ""


def pages_for(which: int | str | None, state: State) -> Iterator[PageRef]:
    """Pages that a round has to have at hand from the beginning. The last active checkpoint is in none."""
    if isinstance(which, str):
        which = (parse_checkpoint(which) or ("", -1))[1]
    if which is None:
        return iter(() if state.active else state.pages)
    return (page for page in state.pages if page.may_have_number(which))


def _newest_at_hand(state: State) -> Iterator[CheckpointRecord]:
    """The newest first, down to what may be older than something in a page."""
    first = state.newest_first()
    youngest = max((attempt_age(page.attempts[1]) for page in state.pages), default=None)
    yield from first[:1]
    yield from (one for one in first[1:] if youngest is None or attempt_age(one.attempt) > youngest)


def _shown(which: int | str | None) -> str:
    return "the newest checkpoint" if which is None else f"checkpoint {which}"
