"""Restores of all ranks that need no coordinator: rank 0 decides by its rules, from what is on storage.

So training begins while the coordinator is still starting. Rank 0 holds a lease on what is being restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from distckpt.coordinator.client.client import raised
from distckpt.coordinator.client.error_text import from_text, to_text
from distckpt.coordinator.machine.restore_round import RestoreRound, pages_for
from distckpt.coordinator.messages import (
    FillFrom,
    FinishWith,
    MatchWith,
    Mismatched,
    Refused,
    Reply,
    Restore,
    Restored,
    RunOpened,
)
from distckpt.coordinator.shell.sealing import read_log_tail
from distckpt.directory.lease import hold
from distckpt.directory.log import read_tail
from distckpt.directory.pages import read_page, readable
from distckpt.errors import (
    AbsentRanksError,
    CheckpointNotFoundError,
    DirectoryLostError,
    DistckptError,
    MissingRanksError,
    RestoreError,
    StaleRunError,
    ranks_at_hosts,
)
from distckpt.format.json.log import State
from distckpt.format.json.paging import opened
from distckpt.storage import Store
from distckpt.threads.coordinator import Coordinator
from distckpt.threads.looper import LooperThread
from distckpt.world import Council, Refusal

SIGNS = 8
"""How many signs of life a rank gives, while it is at work, in the time after which its silence counts as death."""


class Opening(Protocol):
    """The run of these ranks, which may not be open yet."""

    @property
    def opened(self) -> RunOpened | None:
        """The run, if it is open by now."""

    def open(self) -> object:
        """Wait until it is. Raises what keeps it from that."""


class Gathering:
    """Answers Restore as a coordinator would, by a consultation of all ranks. Used from one thread.

    Rank 0 waits for the ``opening`` if an attempt on storage lacks nothing but its commit, which only a coordinator can
    give it. ``newest`` is the newest checkpoint (its attempt, '' for none) when the first restore came to its end, None
    before.
    """

    def __init__(
        self, council: Council, store: Store, name: str, hosts: Mapping[int, str], save_timeout: float, opening: Opening
    ) -> None:
        self.newest: str | None = None
        self._council = council
        self._store = store
        self._hosts = hosts
        self._timeout = save_timeout
        self._host = _Host(store, name, hosts, opening)
        self._signs: Coordinator | None = None

    def ask(self, request: Restore, timeout: float) -> Reply:
        """The answer, the same on all ranks. MissingRanksError names those that do not come, or die on the way."""
        if request.failed:
            self._end()
            self._council.refuse(request.failed)
            raise RestoreError(f"{self._store.url}: this rank failed: {request.failed}")
        text = msgspec.json.encode(request).decode()
        try:
            answer = _decoded(self._council.consult(text, self._host.decide, min(timeout, self._timeout)))
        except BaseException as error:
            self._end()
            if isinstance(error, AbsentRanksError):
                hosts = {rank: self._hosts[rank] for rank in error.ranks if rank in self._hosts}
                raise MissingRanksError(None, list(error.ranks), hosts, error.timeout, "to restore") from None
            if isinstance(error, Refusal):
                who = ranks_at_hosts([error.rank], self._hosts)
                raise RestoreError(f"{self._store.url}: {who} failed: {error.reason}") from None
            raise
        if isinstance(answer.reply, MatchWith | FillFrom | FinishWith):
            self._begin()
        else:
            self._end()
            self.newest = answer.newest if self.newest is None else self.newest
        return raised(answer.reply)

    def check_newest(self) -> None:
        """RestoreError if the newest checkpoint is another one than when the last restore ended."""
        newest = _newest(read_tail(self._store).head)
        if self.newest is not None and newest != self.newest:
            raise RestoreError(
                f"{self._store.url}: while this run was being opened, an earlier one committed {newest}, which is newer "
                "than what this one has restored. It must not go on from there: start it again"
            )

    def _begin(self) -> None:
        """From now on this rank may take its time."""
        if self._signs is None:
            self._signs = Coordinator([])
            pause = self._timeout / SIGNS
            LooperThread.loop(self._signs, pause, self._council.sign, name="distckpt-signs", skip_missed=True)

    def _end(self) -> None:
        self._host.end()
        signs, self._signs = self._signs, None
        if signs is not None:
            signs.request_stop()
            signs.join(ignore_live_threads=True)


class _Host:
    """Rank 0's part: the round, and the lease on its candidate."""

    def __init__(self, store: Store, name: str, hosts: Mapping[int, str], opening: Opening) -> None:
        self._store = store
        self._name = name
        self._hosts = hosts
        self._opening = opening
        self._round: RestoreRound | None = None
        self._orders: list[int] = []
        self._held = ""
        self._lease = contextlib.ExitStack()

    def decide(self, texts: Sequence[str]) -> str:
        """What to answer to what all ranks say."""
        try:
            messages = [msgspec.json.decode(text, type=Restore) for text in texts]
            reply = self._hear(messages)
        except DistckptError as error:
            reply = Refused(error)
        except Exception as error:  # noqa: BLE001 - the others wait for an answer
            reply = Refused(
                RestoreError(f"{self._store.url}: rank 0 could not decide: {type(error).__name__}: {error}")
            )
        newest = _newest(self._round.state) if self._round is not None else ""
        if not isinstance(reply, MatchWith | FillFrom | FinishWith):
            self.end()
        return _encoded(_Answer(reply, newest))

    def end(self) -> None:
        """Let go of what was being restored."""
        self._round, self._held = None, ""
        self._lease.close()

    def _hear(self, messages: list[Restore]) -> Reply:
        first = messages[0]
        orders = [message.order for message in messages]
        if self._round is None or self._orders[0] != first.order:
            self._orders, self._round = orders, self._new_round(first, self._first_state())
        round = self._round
        for rank, order in enumerate(orders):
            if order != self._orders[rank]:
                who = ranks_at_hosts([rank], self._hosts)
                raise RestoreError(f"{self._store.url}: {who} has begun another restore: all must begin it again")
        for rank, message in enumerate(messages):
            if round.outcome is None:
                round.hear(rank, self._hosts.get(rank, ""), message)
        if round.is_complete:
            round.advance(read_tail(self._store).head)
            if round.wants_pages:
                state, lost = readable(self._store, round.state)
                round.extend(state, [str(one.error) for one in lost])
        if isinstance(round.outcome, Restored):
            state, run = read_tail(self._store).head, self._opening.opened
            if run is not None and run.run < state.run:
                raise StaleRunError(self._store.url, run.run, state.run)
            if first.which is None and _newest(state) != _newest(round.state):  # another run has committed meanwhile
                round = self._round = self._new_round(first, state)
        return round.outcome or self._asked(round, first)

    def _asked(self, round: RestoreRound, first: Restore) -> Reply:
        """What is wanted next, of a checkpoint that cannot be deleted meanwhile."""
        while round.outcome is None and self._held != round.current.attempt:
            self._lease.close()
            try:
                self._lease.enter_context(hold(self._store, round.current.attempt, "a restore of all ranks"))
                self._held = round.current.attempt
            except CheckpointNotFoundError:  # retired since the log was read
                round = self._round = self._new_round(first, read_tail(self._store).head)
        return round.outcome or round.question

    def _new_round(self, first: Restore, state: State) -> RestoreRound:
        state = opened(state, {page.id: read_page(self._store, page) for page in pages_for(first.which, state)})
        round = RestoreRound(self._store.url, len(self._hosts), first.which, first.partial, self._name, state)
        if not round.candidates:  # and all ranks are here
            round.advance(state)
        return round

    def _first_state(self) -> State:
        """What the log says. DirectoryLostError if it is not there any more, or is not that of the run, which is open."""
        run = self._opening.opened  # before the log is read, in which opening it is an entry
        tail = read_log_tail(self._store)
        state = tail.entry.state if tail.entry is not None else State()
        if run is not None and (tail.entry is None or run.origin not in ("", state.origin)):
            raise DirectoryLostError(self._store.url, run.run, state.run)
        if tail.complete:
            self._opening.open()
            return read_tail(self._store).head
        return state


class _Answer(msgspec.Struct, frozen=True):
    reply: Any
    newest: str


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (MatchWith, FillFrom, FinishWith, Mismatched, Restored)}


def _encoded(answer: _Answer) -> str:
    reply = answer.reply
    body = to_text(reply.error) if isinstance(reply, Refused) else reply
    return msgspec.json.encode([type(reply).__name__, body, answer.newest]).decode()


def _decoded(text: str) -> _Answer:
    kind, body, newest = msgspec.json.decode(text, type=tuple[str, msgspec.Raw, str])
    if kind in _KINDS:
        return _Answer(msgspec.json.decode(body, type=_KINDS[kind]), newest)
    return _Answer(Refused(from_text(msgspec.json.decode(body, type=str))), newest)


def _newest(state: State) -> str:
    return next((record.attempt for record in state.newest_first()), "")
