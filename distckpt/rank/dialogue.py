"""What a rank and the coordinator say to each other about a save."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from distckpt.coordinator.client.client import Client
from distckpt.coordinator.messages import (
    AwaitPlan,
    AwaitPublished,
    Describe,
    Fail,
    Join,
    Joined,
    Lag,
    Late,
    MakeRoom,
    Planned,
    RankRequest,
    Receipt,
    Reply,
    Skipped,
    Unknown,
)
from distckpt.errors import CoordinatorError, DistckptError, EncodeError, SaveError, ranks_at_hosts
from distckpt.format.arrow.receipt import ShardReceipt
from distckpt.rank.layout import Layout, layout_of
from distckpt.rank.options import SaverOptions
from distckpt.rank.turns import Turns
from distckpt.state.collector import Holding

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 10.0
"""How long a rank waits for the ``checkpoint`` file, which is derived, at most."""

TELL_SECONDS = 10.0
"""How long a rank that gives a save up tries to tell the others."""


class Dialogue:
    """Asks the coordinator for one rank. Safe to use from several threads.

    Every method raises what the coordinator refuses with, and CoordinatorUnavailableError.
    """

    def __init__(self, client: Client, options: SaverOptions, turns: Turns) -> None:
        self._client = client
        self._turns = turns
        # The coordinator itself answers at the save's deadline; twice that means that it does not answer at all.
        self._patience = 2 * options.timeout + 60
        self._buffers = options.buffers
        self._skip_if_busy = options.skip_if_busy
        self._tells = options.rank == 0
        self.lag: Lag | None = None
        """For whom a save waits that has not begun, by the coordinator's last word."""

    def plan(self, order: int, number: int | None, holding: Holding) -> tuple[Layout, Joined] | None:
        """Agree with all ranks on who writes what; None if all of them skip this save."""
        digest = holding.description.digest
        while True:
            joined = self.join(order, number, digest, staged=False)
            if isinstance(joined, Skipped):
                return None
            if not isinstance(joined, Joined):
                raise SaveError(number, f"unexpected answer to Join: {joined!r}")
            if joined.describe and not self.describe(joined, digest, holding.describe(compare=True), None):
                continue
            reply = self._ask(AwaitPlan(joined.attempt))
            if isinstance(reply, Planned):
                return layout_of(digest, reply, holding), joined

    def join(
        self,
        order: int,
        number: int | None,
        digest: str,
        staged: bool,
        plan: str = "",
        attempt: str = "",
        timeout: float | None = None,
    ) -> Reply:
        """Take part in the save with this ``order`` among the rank's saves, in its turn: Joined, or what became of it."""
        self._turns.wait(order, self._patience if timeout is None else timeout)
        skip_if_busy = self._buffers if self._skip_if_busy and number is not None else 0
        while True:
            earlier, age = self._turns.earlier(order), self._turns.age(order)
            join = Join(order, number, digest, plan, staged, attempt, skip_if_busy, earlier, age)
            reply = self._ask(join, timeout)
            if not isinstance(reply, Unknown):
                self._turns.joined(order)
                return reply

    def describe(self, joined: Joined, digest: str, description: bytes, staged: bytes | None) -> bool:
        """Say what this rank holds, and has copied; False if the coordinator knows nothing of the attempt any more."""
        reply = self._ask(Describe(joined.attempt, digest, description, staged))
        return not isinstance(reply, Unknown)

    def report(self, attempt: str, shards: tuple[ShardReceipt, ...], metrics: Mapping[str, float]) -> Reply:
        """These shards have landed. Answered once the checkpoint is committed."""
        return self._ask(Receipt(attempt, shards, metrics))

    def fail(self, attempt: str, reason: str) -> None:
        """This rank cannot do its part. The usual answer is the failure itself, sent back and raised here."""
        self._ask(Fail(attempt, reason))

    def make_room(self) -> None:
        """Have deleted what dead attempts have left on a store that is full. Raises nothing if it cannot be done."""
        try:
            self._ask(MakeRoom())
        except DistckptError as error:
            logger.warning("no room could be made for this save: %s", error)

    def over(self, order: int) -> None:
        """A save has ended for this rank, however it did. Saying so twice does no harm."""
        self._turns.end(order)

    def give_up(self, order: int, number: int | None, error: BaseException) -> None:
        """Fail a save, joined or not, that ``error`` has ended on this rank: the others would wait until the deadline.

        Raises nothing if they cannot be told, and tries that for ``TELL_SECONDS`` only: whoever presses Ctrl-C waits.
        """
        if isinstance(error, CoordinatorError | SaveError) and not isinstance(error, EncodeError):
            return  # it is what the coordinator has said, to all ranks; or there is none that could be told
        try:
            reply = self.join(order, number, "", staged=False, timeout=TELL_SECONDS)
            if isinstance(reply, Joined):
                reason = str(error) if isinstance(error, DistckptError) else f"{type(error).__name__}: {error}"
                self._ask(Fail(reply.attempt, reason.removesuffix(": ")), TELL_SECONDS)
        except SaveError as problem:
            logger.debug("the other ranks know already that this save fails: %s", problem)
        except Exception as problem:  # noqa: BLE001 - it must not take the place of what is being raised
            logger.warning("the other ranks could not be told that this save fails: %s", problem)

    def await_published(self) -> None:
        """Return once the ``checkpoint`` file says what has been committed so far, or it is plain that it may not soon.

        Raises nothing: the file is derived, and what was committed is committed.
        """
        try:
            if isinstance(self._client.ask(AwaitPublished(), PUBLISH_SECONDS), Unknown):
                self._client.ask(AwaitPublished(), PUBLISH_SECONDS)  # the coordinator was replaced
        except DistckptError as error:
            logger.warning("the `checkpoint` file may lag behind what was committed: %s", error)

    def _ask(self, request: RankRequest, timeout: float | None = None) -> Reply:
        patience = self._patience if timeout is None else timeout
        while isinstance(reply := self._client.ask(request, patience), Late | Lag):
            if isinstance(reply, Late):
                _warn(reply)
            else:
                self._wait_for(reply)
        if isinstance(request, Join):
            self.lag = None
        return reply

    def _wait_for(self, lag: Lag) -> None:
        self.lag = lag
        if self._tells:
            logger.warning(
                "the save waits for the group %r, for %.0f s by now: %d checkpoints wait for it, or are about to, and it was "
                "made with max_backlog=%d and on_lag='block'. Start (more of) its workers, or make an end of it: delete "
                "_groups/%s in the directory",
                lag.group,
                lag.seconds,
                lag.waiting,
                lag.most,
                lag.group,
            )


def _warn(late: Late) -> None:
    who = ranks_at_hosts(late.ranks, late.hosts)
    logger.warning(
        "waiting for %s %s, for %.1f s by now; after %g s the save fails", who, late.stage, late.seconds, late.timeout
    )
