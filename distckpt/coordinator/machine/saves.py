"""Saves in flight: rounds of joins, plans, receipts, sealing and commit. Every message may come late or twice.

From a rank's receipt to its answer: ``receipt``; once all have landed ``_seal``; ``sealed`` when the shell has done so;
``_commit`` once it is known who reads what; and when the log entry counts, ``committed`` answers all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.coordinator.machine import answers
from distckpt.coordinator.machine.actions import MakePlan, PlanMade, Seal, Sealed, StepFailed
from distckpt.coordinator.machine.backpressure import Backpressure
from distckpt.coordinator.machine.desk import Desk, Identities
from distckpt.coordinator.machine.intentions import Commit, Discard
from distckpt.coordinator.machine.keeping import Keeping
from distckpt.coordinator.machine.ledger import Ledger
from distckpt.coordinator.machine.plans import HeldPlan, Plans
from distckpt.coordinator.machine.records import never_committed
from distckpt.coordinator.machine.roundbook import RoundBook
from distckpt.coordinator.machine.rounds import Phase, SaveRound
from distckpt.coordinator.machine.runs import Run, Runs
from distckpt.coordinator.messages import (
    Accepted,
    AwaitPlan,
    Committed,
    Describe,
    Fail,
    Join,
    Prepared,
    Receipt,
    Refused,
    Reply,
    Skipped,
    Unknown,
)
from distckpt.errors import (
    CommitUnknownError,
    DistckptError,
    MissingRanksError,
    NumberMismatchError,
    RankFailedError,
    SaveError,
    UnreadableError,
)
from distckpt.format.json.log import CheckpointRecord

PATIENCE = 5.0
"""How long a commit waits for the leases. Without them it retires nothing, which comes later then."""


class Saves:
    """All save rounds of the current run, and the outcomes of the latest ones."""

    def __init__(
        self, desk: Desk, ledger: Ledger, identities: Identities, runs: Runs, book: RoundBook, keeping: Keeping
    ) -> None:
        self._desk = desk
        self._ledger = ledger
        self._identities = identities
        self._runs = runs
        self._book = book
        self._keeping = keeping
        self._plans = Plans()
        self._backpressure = Backpressure(desk, book, keeping)
        self._told_retired = set[str]()

    def waiting(self) -> dict[str, tuple[int, ...]]:
        """For each attempt in flight the ranks that are still awaited."""
        return {round.attempt: tuple(round.missing()) for round in self._book}

    def deadlines(self) -> Iterator[float]:
        """When rounds will be given up, in monotonic seconds."""
        yield from self._backpressure.deadlines()
        for round in self._book:
            if round.deadline is not None:
                yield round.deadline
                if (remind_at := answers.remind_at(round, self._current.save_timeout)) is not None:
                    yield remind_at

    # ---- runs ------------------------------------------------------------------------------------------------------

    def begin_run(self, run: Run) -> None:
        """Serve this run from now on."""
        self._book.begin(self._ledger.state.saves)
        self._plans.clear()

    def abandon(self, error: DistckptError) -> None:
        """End every round of the run with ``error``: another run begins."""
        self._backpressure.end(Refused(error))
        for round in self._book:
            self._fail(round, error)

    def everyone_left(self) -> None:
        """Give up rounds that nobody will finish. Those whose shards have all landed go on."""
        self._backpressure.end(Refused(SaveError(None, "every rank has left the run")))
        for round in self._book:
            if not round.landed:
                self._fail(round, SaveError(round.number, "every rank has left the run"))

    # ---- requests --------------------------------------------------------------------------------------------------

    def join(self, ticket: int, rank: int, message: Join) -> None:
        """A rank takes part in its next save."""
        record = self._ledger.state.find(message.attempt) if message.attempt else None
        if record is not None:
            self._desk.answer(ticket, Committed(record))
            return
        round = self._book.at(rank, message.order)
        if round is None:
            if self._book.is_over(rank, message.order):
                reason = "it came too late: this rank has gone on to a later save already"
                self._desk.answer(ticket, Refused(SaveError(message.number, reason)))
                return
            if self._backpressure.holds(ticket, rank, message):
                return
            round = self._enter(rank, message)
        if not round.over:
            self._take_in(round, rank, message)
        self._desk.answer(ticket, answers.joined(round, rank))
        self._advance(round)

    def describe(self, ticket: int, rank: int, message: Describe) -> None:
        """A rank says what it holds."""
        prepared = self._book.of(message.attempt)
        if prepared is not None and isinstance(prepared.outcome, Prepared):
            self._desk.answer(ticket, Accepted())
            return
        round = self._round_of(ticket, rank, message.attempt)
        if round is None:
            return
        self._desk.answer(ticket, Accepted())
        if rank in round.undescribed:
            self._plans.describe(rank, message.digest, message.description)
            round.describe(rank, message)
            self._advance(round)

    def await_plan(self, ticket: int, rank: int, message: AwaitPlan) -> None:
        """A rank wants to know what it writes."""
        prepared = self._book.of(message.attempt)
        if prepared is not None and prepared.plan is not None and isinstance(prepared.outcome, Prepared):
            self._desk.answer(ticket, answers.planned(prepared.plan, rank))
            return
        round = self._round_of(ticket, rank, message.attempt)
        if round is None:
            return
        if rank in round.asked_again:
            self._desk.answer(ticket, Unknown())  # it joins again, and is asked to describe what it holds
            return
        if round.plan is None:
            self._desk.hold(ticket, round.awaiting_plan, rank)
            return
        self._desk.answer(ticket, answers.planned(round.plan, rank))
        if rank not in round.told and not round.landed:
            round.told.add(rank)
            round.deadline = self._later()

    def receipt(self, ticket: int, rank: int, message: Receipt) -> None:
        """All shards of a rank have landed."""
        round = self._round_of(ticket, rank, message.attempt)
        if round is None:
            return
        self._desk.hold(ticket, round.awaiting_end, rank)
        if rank in round.receipts or not round.saves:
            return
        round.land(rank, message, self._desk.mono)
        if round.plan is not None:
            round.deadline = self._later()
            self._check_rows(round, rank, message)
            self._advance(round)

    def fail(self, ticket: int, rank: int, message: Fail) -> None:
        """A rank cannot do its part. Once all shards have landed, that changes nothing any more."""
        round = self._book.of(message.attempt)
        known = round is not None or self._ledger.state.find(message.attempt) is not None
        self._desk.answer(ticket, Accepted() if known else Unknown())
        if round is not None and not round.over and not round.landed:
            self._fail_rank(round, rank, message.reason)

    # ---- results of actions, and time ------------------------------------------------------------------------------

    def plan_made(self, event: PlanMade) -> None:
        """The plan of a round is there."""
        round = self._book.of(event.attempt)
        if round is None or round.phase is not Phase.PLANNING:
            return
        rank = round.misplanned(event.plan)
        if rank is not None:
            self._fail_rank(round, rank, "the plan wants other chunks of it than it has copied already")
            return
        digests = {rank: join.digest for rank, join in round.joins.items()}
        self._adopt(round, self._plans.add(event.plan, digests))

    def step_failed(self, event: StepFailed) -> None:
        """Planning or sealing failed for good."""
        round = self._book.of(event.attempt)
        if round is not None and round.phase in (Phase.PLANNING, Phase.SEALING):
            self._fail(round, event.error)

    def tick(self) -> None:
        """Give up what is overdue; begin what waited for a group of readers and need not any more."""
        for waited in self._backpressure.let_go():
            self.join(*waited)
        for round in self._book:
            if not round.over and round.deadline is not None and round.deadline <= self._desk.mono:
                self._expire(round)
            elif (remind_at := answers.remind_at(round, self._current.save_timeout)) and remind_at <= self._desk.mono:
                reminder = answers.remind(round, self._current, self._desk.mono)
                if reminder is not None:
                    self._desk.answer(*reminder)

    # ---- rounds ----------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> Run:
        assert self._runs.current is not None
        return self._runs.current

    def _later(self) -> float:
        return self._desk.mono + self._current.save_timeout

    def _round_of(self, ticket: int, rank: int, attempt: str) -> SaveRound | None:
        """The unfinished round that a rank of it speaks of. None if there is none, and that has been answered."""
        round = self._book.of(attempt)
        if round is None or not round.takes_part(rank):
            record = self._ledger.state.find(attempt)
            self._desk.answer(ticket, Unknown() if record is None else Committed(record))
            return None
        if round.outcome is not None:
            self._desk.answer(ticket, round.outcome)
            return None
        return round

    def _enter(self, rank: int, message: Join) -> SaveRound:
        """The round that a rank's next save belongs to, new if need be; and the end of those that it will not join."""
        for given_up in self._book.hear(rank, message):
            self._fail_rank(given_up, rank, "it has gone on to its next save without having finished this one")
        began = self._desk.mono - message.age
        round = self._book.find(rank, message, began) or self._new_round(rank, message)
        for other in self._book.enter(round, rank, message):
            other.strays[rank] = round.number
            elsewhere = {**other.strays, **dict.fromkeys(other.orders, other.number)}
            round.strays |= {one: number for one, number in elsewhere.items() if one not in round.orders}
            self._fail(other, self._astray(other, [rank]), frozenset({rank}))
        beyond = self._book.passed_by(round) if len(round.orders) == 1 and not round.over else {}
        if beyond:
            round.strays |= beyond
            self._fail(round, self._astray(round, sorted(beyond)[: answers.NAMED_RANKS]), frozenset(beyond))
        return round

    def _new_round(self, rank: int, first: Join) -> SaveRound:
        busy = self._book.saving()
        attempt = self._identities.attempt(self._ledger.epoch)
        missed = self._book.missed(rank, first.number)
        round = SaveRound(first.number, attempt, self._current.world_size, self._later(), missed=missed)
        self._book.add(round)
        # A rank that has staged is past the question: it joins again after the coordinator was replaced.
        may_skip = first.skip_if_busy > 0 and round.saves and not first.staged
        if may_skip and (first.skip_if_busy <= busy or self._keeping.lag(busy) is not None):
            self._end(round, Skipped())
        return round

    def _take_in(self, round: SaveRound, rank: int, message: Join) -> None:
        known = round.joins.get(rank)
        if message.number != round.number:
            self._fail(round, self._mismatch(round, {rank: message.number}))
        elif known is None or (message.staged and not known.staged and round.phase is Phase.JOINING):
            # A delayed copy of an older Join may have come first; what the rank has copied counts.
            round.join(rank, message, self._plans)
        elif round.misjoined(rank, message):
            self._fail_rank(round, rank, "it had copied its chunks before it could be planned for")

    def _advance(self, round: SaveRound) -> None:
        if round.can_plan:
            self._plan(round)
        # Checkpoints are committed in save order, so a fast save waits for an earlier one that all have joined.
        if round.can_seal and not self._book.must_wait(round):
            if self._book.in_sequence(round):
                self._seal(round)
            else:
                self._fail(round, SaveError(round.number, "a later save of a rank was committed before this one"))

    def _plan(self, round: SaveRound) -> None:
        held = self._plans.fitting(round.joins)
        if held is not None:
            self._adopt(round, held)
            return
        # Copies are compared whenever a plan is made, so all who can say what they hold now must have said it.
        if stale := round.not_compared():
            round.describe_again(stale)
            for ticket in [ticket for ticket, rank in round.awaiting_plan.items() if rank in round.asked_again]:
                self._desk.answer(ticket, Unknown())
            return
        staged: dict[int, bytes] = {}
        for rank in round.staged_ranks():
            rows = round.copied(rank)
            if rows is None:
                self._fail_rank(round, rank, "it did not say which chunks it has copied")
                return
            staged[rank] = rows
        round.plan_begins()
        self._desk.emit(MakePlan(round.attempt, round.number, round.descriptions, staged, frozenset(round.fresh)))

    def _adopt(self, round: SaveRound, held: HeldPlan) -> None:
        round.follow(held.plan, self._later())
        for ticket, rank in list(round.awaiting_plan.items()):
            round.told.add(rank)
            self._desk.answer(ticket, answers.planned(held.plan, rank))
        if not round.saves:
            self._end(round, Prepared())
            return
        for rank, receipt in list(round.receipts.items()):
            self._check_rows(round, rank, receipt)
        self._advance(round)

    def _check_rows(self, round: SaveRound, rank: int, receipt: Receipt) -> None:
        if round.plan is None:
            return
        landed = sum(shard.rows for shard in receipt.shards)
        wanted = round.plan.row_count(rank)
        if landed != wanted:
            self._fail_rank(round, rank, f"its shards hold {landed} chunks and the plan gives it {wanted}")

    # ---- from the last receipt to the commit -----------------------------------------------------------------------

    def _seal(self, round: SaveRound) -> None:
        """Have every shard looked at and the manifest written; learn meanwhile who reads what."""
        self._keeping.peek()
        round.seal_begins(self._desk.now)
        assert round.plan is not None
        assert round.number is not None
        run = self._current
        self._desk.emit(
            Seal(
                attempt=round.attempt,
                name=run.name,
                number=round.number,
                epoch=self._ledger.epoch,
                time=round.time,
                plan=round.plan,
                receipts=round.receipts,
                hosts=dict(run.hosts),
            )
        )

    def sealed(self, event: Sealed) -> None:
        """Everything of an attempt is durable: commit it, as soon as it is known who reads what."""
        round = self._book.of(event.attempt)
        if round is None or round.phase is not Phase.SEALING:
            return
        round.sealed(self._current.name, event, self._desk.mono + PATIENCE)
        if not self._keeping.looking:
            self._commit(round)

    def readers_known(self) -> None:
        """It is being read no longer who needs what: commit what is sealed."""
        for round in self._book:
            if round.phase is Phase.SEALED and not self._keeping.looking:
                self._commit(round)

    def _commit(self, round: SaveRound) -> None:
        assert round.record is not None
        round.commit_begins(self._later())
        retention, spared, followed = self._current.retention, self._keeping.spared, self._keeping.followed
        saves = min(round.orders.values()) + 1
        self._ledger.intend(Commit(round.record, saves, retention, spared, followed))

    def committed(self, record: CheckpointRecord) -> None:
        """The log entry counts: tell the ranks, and end the saves that were overtaken. What retires is deleted next."""
        round = self._book.of(record.attempt)
        retired = answers.newly_retired(self._ledger.state, self._told_retired)
        if round is not None:
            for other in self._book.committed(round):
                reason = "a later save was committed before every rank had joined this one"
                self._fail(other, SaveError(other.number, reason))
            self._end(round, Committed(record, answers.landing(round, self._current), retired))
        self._keeping.look()

    def commit_refused(self, record: CheckpointRecord, reason: str) -> None:
        """No reader would take a log entry with it, so it does not become a checkpoint."""
        round = self._book.of(record.attempt)
        if round is not None and not round.over:
            self._fail(round, UnreadableError(record.number, reason))

    # ---- ends that nobody wanted -----------------------------------------------------------------------------------

    def _expire(self, round: SaveRound) -> None:
        if round.phase is Phase.SEALED:
            self._commit(round)
            return
        if round.phase is Phase.COMMITTING:
            round.deadline = self._later()
            self.overdue(round)
            return
        missing = round.missing()
        if not missing:
            round.deadline = None
            return
        astray = [rank for rank in missing if rank in round.strays]
        if astray:
            self._fail(round, self._astray(round, astray), frozenset(missing))
            return
        hosts = self._current.hosts_of(missing)
        error = MissingRanksError(round.number, missing, hosts, self._current.save_timeout, answers.awaited(round))
        self._fail(round, error, frozenset(missing))

    def overdue(self, round: SaveRound) -> None:
        """Tell who waits if the store does not say what became of the log entry. It is retried all the same."""
        if self._ledger.tries:
            reason = f"its log entry may or may not have been written, and is tried again: {self._ledger.doubt}"
            self._desk.answer_shelf(round.awaiting_end, Refused(CommitUnknownError(round.number, reason)))

    def _fail_rank(self, round: SaveRound, rank: int, reason: str) -> None:
        host = self._current.hosts.get(rank, "")
        self._fail(round, RankFailedError(round.number, rank, host, reason))

    def _astray(self, round: SaveRound, ranks: list[int]) -> SaveError:
        """Ranks have gone on to another save or prepare, without having joined this one."""
        return self._mismatch(round, {rank: round.strays[rank] for rank in ranks})

    def _mismatch(self, round: SaveRound, others: dict[int, int | None]) -> SaveError:
        """These ranks save other numbers than the ranks of ``round``."""
        numbers = (
            dict.fromkeys(sorted(round.orders.keys() - others.keys())[: answers.NAMED_RANKS], round.number) | others
        )
        hosts = self._current.hosts_of(list(numbers))
        if len(set(numbers.values())) > 1:
            return NumberMismatchError(round.number, numbers, hosts)
        who = ", ".join(f"rank {rank} ({hosts.get(rank, '')})" for rank in others)
        return SaveError(round.number, f"{who} went on to another save without having joined this one")

    def _fail(self, round: SaveRound, error: DistckptError, absent: frozenset[int] = frozenset()) -> None:
        landed = round.landed
        self._end(round, Refused(error), absent)
        if landed:
            name, number = self._current.name, round.number or 0
            failed = never_committed(name, number, round.attempt, round.time, round.world_size)
            self._ledger.withdraw(round.attempt)
            self._ledger.intend(Discard(failed))
        self._keeping.collect()

    def _end(self, round: SaveRound, outcome: Reply, absent: frozenset[int] = frozenset()) -> None:
        self._book.close(round, failed=isinstance(outcome, Refused) and not round.landed)
        round.end(outcome, self._desk.mono, absent)
        self._desk.answer_shelf(round.awaiting_plan, outcome)
        self._desk.answer_shelf(round.awaiting_end, outcome)
        for other in self._book:
            self._advance(other)
