"""The machine's part in stops of the whole cluster: who is told what, who is missed, and what survives a restart."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from distckpt.coordinator.machine.actions import Forgotten
from distckpt.coordinator.machine.stops import MANAGER_SILENCE, REMEMBERED_GENERATIONS, TOLD_OF_LEAVING
from distckpt.coordinator.messages import (
    AwaitStop,
    FromRank,
    Heartbeat,
    Leave,
    Members,
    OpenRun,
    Refused,
    Reply,
    RunOpened,
    StopReport,
    StopState,
    Unknown,
    merged_members,
)
from distckpt.errors import StaleRunError
from distckpt.keep import Retention
from tests.support.driving import TIMEOUT, Driver

SILENCE = 8.0
PATIENCE = 2.0
FAILED = StopReport(1, "host1", "ValueError", ("builtins.ValueError",), "bad", "the traceback")


def await_stop(
    run: int,
    rank: int,
    generation: int = 1,
    known: StopReport | None = None,
    members: Mapping[int, str | None] | None = None,
    silence: float | None = SILENCE,
    patience: float = PATIENCE,
) -> FromRank:
    return FromRank(run, rank, AwaitStop(generation, known, members or {rank: f"host{rank}"}, silence, patience))


def opened(world: int = 3) -> tuple[Driver, int]:
    driver = Driver().lead()
    return driver, driver.open(world)


def stop_of(reply: Reply | None) -> StopReport | None:
    assert isinstance(reply, StopState), reply
    return reply.stop


def live(driver: Driver, run: int, ranks: list[int], seconds: float, generation: int = 1) -> None:
    """Time passes; these ranks ask again and again."""
    for _ in range(round(seconds)):
        driver.wait(1.0)
        for rank in ranks:
            driver.ask(await_stop(run, rank, generation, patience=0.0))


# ---- telling ------------------------------------------------------------------------------------------------------------


def test_the_first_report_reaches_everyone_at_once() -> None:
    driver, run = opened()
    waiting = [driver.ask(await_stop(run, rank)) for rank in (0, 2)]
    assert not driver.replies.keys() & set(waiting)
    assert stop_of(driver.answer(await_stop(run, 1, known=FAILED, patience=0))) == FAILED
    assert [stop_of(driver.replies[ticket]) for ticket in waiting] == [FAILED, FAILED]
    second = StopReport(2, "host2", "KeyError", (), "later")
    assert stop_of(driver.answer(await_stop(run, 2, known=second, patience=0))) == FAILED
    assert stop_of(driver.answer(await_stop(run, 0))) == FAILED, "a rank that comes late"


def test_a_plain_stop_is_a_stop_and_comes_before_a_later_error() -> None:
    driver, run = opened()
    plain = StopReport(0, "host0")
    driver.ask(await_stop(run, 0, known=plain, patience=0))
    assert stop_of(driver.answer(await_stop(run, 1, known=FAILED))) == plain


def test_who_knows_of_the_stop_is_not_told_again_and_again() -> None:
    driver, run = opened()
    driver.ask(await_stop(run, 1, known=FAILED, patience=0))
    ticket = driver.ask(await_stop(run, 0, known=FAILED))
    assert ticket not in driver.replies
    driver.wait(PATIENCE)
    assert stop_of(driver.replies[ticket]) == FAILED


def test_everyone_is_answered_when_the_first_loses_patience() -> None:
    driver, run = opened()
    first = driver.ask(await_stop(run, 0, patience=3.0))
    driver.wait(1.0)
    second = driver.ask(await_stop(run, 1, patience=1.5))
    assert driver.machine.next_deadline() == driver.mono + 1.5
    driver.wait(1.4)
    assert not driver.replies.keys() & {first, second}
    driver.wait(0.1)
    assert driver.replies[second] == StopState(None, {0: "host0", 1: "host1"})
    assert stop_of(driver.replies[first]) is None
    third = driver.ask(await_stop(run, 0, patience=3.0))
    driver.wait(2.9)
    assert third not in driver.replies, "the impatient one is gone"
    driver.wait(0.1)
    assert third in driver.replies


def test_repeated_and_forgotten_questions_do_no_harm() -> None:
    driver, run = opened()
    question = await_stop(run, 0)
    tickets = [driver.ask(question) for _ in range(3)]
    driver.feed(Forgotten(tickets[0]))
    for _ in range(2):
        driver.ask(await_stop(run, 1, known=FAILED, patience=0))
    assert tickets[0] not in driver.replies
    assert [stop_of(driver.replies[ticket]) for ticket in tickets[1:]] == [FAILED, FAILED]


def test_a_late_report_of_an_older_generation_is_dropped() -> None:
    driver, run = opened()
    driver.ask(await_stop(run, 0, known=StopReport(0, "host0"), patience=0))
    waiting = driver.ask(await_stop(run, 0, generation=2))
    driver.ask(await_stop(run, 1, known=FAILED, patience=0))
    driver.ask(await_stop(run, 1, generation=2, patience=0))
    assert waiting not in driver.replies
    driver.ask(await_stop(run, 1, generation=2, known=FAILED, patience=0))
    assert stop_of(driver.replies[waiting]) == FAILED


def test_a_newer_run_turns_the_older_one_away() -> None:
    driver, run = opened()
    waiting = driver.ask(await_stop(run, 0))
    driver.ask(await_stop(run, 1, known=FAILED, patience=0))
    newer = driver.open(3, token="restarted job")
    reply = driver.answer(await_stop(run, 0))
    assert isinstance(reply, Refused)
    assert isinstance(reply.error, StaleRunError)
    assert stop_of(driver.replies[waiting]) == FAILED
    assert stop_of(driver.answer(await_stop(newer, 0, patience=0))) is None
    held = driver.ask(await_stop(newer, 1))
    driver.open(3, token="restarted again")
    assert isinstance(cast(Refused, driver.replies[held]).error, StaleRunError)


def test_generations_that_everyone_has_left_are_forgotten_but_for_the_latest() -> None:
    driver, run = opened(1)
    for generation in range(1, 101):
        driver.ask(await_stop(run, 0, generation, known=StopReport(0, "host0"), patience=0))
        driver.ask(await_stop(run, 0, generation, silence=None, patience=0))
    assert len(driver.machine._stops._generations) == REMEMBERED_GENERATIONS
    assert stop_of(driver.answer(await_stop(run, 0, 100))) is not None


# ---- silence ------------------------------------------------------------------------------------------------------------


def test_a_rank_that_falls_silent_stops_everyone() -> None:
    driver, run = opened()
    live(driver, run, [0, 1, 2], 5)
    live(driver, run, [0, 2], SILENCE - 1)
    waiting = driver.ask(await_stop(run, 0))
    assert waiting not in driver.replies
    driver.wait(1.0)
    stop = stop_of(driver.replies[waiting])
    assert stop is not None
    assert (stop.rank, stop.host, stop.silent, stop.kind) == (1, "host1", SILENCE, "RankSilentError")
    assert stop_of(driver.answer(await_stop(run, 1, patience=0))) == stop, "it was only cut off"


def test_a_rank_that_never_joins_is_missed_when_its_manager_is_silent() -> None:
    driver, run = opened(3)
    driver.wait(10 * MANAGER_SILENCE)
    live(driver, run, [0, 2], MANAGER_SILENCE - 1)
    assert stop_of(driver.answer(await_stop(run, 0, patience=0))) is None, "counted from when the watching began"
    waiting = driver.ask(await_stop(run, 0))
    driver.wait(2.0)
    stop = stop_of(driver.replies[waiting])
    assert stop is not None
    assert (stop.rank, stop.host, stop.silent) == (1, "host1", MANAGER_SILENCE)


def test_a_longer_silence_timeout_counts_for_those_too_that_have_not_joined() -> None:
    driver, run = opened(2)
    waiting = driver.ask(await_stop(run, 0, silence=100.0, patience=1000.0))
    for _ in range(99):
        driver.wait(1.0)
        driver.ask(FromRank(run, 0, Heartbeat()))
    assert waiting not in driver.replies
    driver.wait(1.0)
    stop = stop_of(driver.replies[waiting])
    assert stop is not None
    assert stop.rank == 1


def test_a_rank_that_never_joins_is_not_missed_while_its_manager_lives_or_when_it_has_left() -> None:
    driver, run = opened(4)
    driver.ask(FromRank(run, 2, Leave()))
    for _ in range(15):
        live(driver, run, [0, 3], 20)
        driver.ask(FromRank(run, 1, Heartbeat()))
    driver.ask(FromRank(run, 1, Leave()))
    live(driver, run, [0, 3], 3 * MANAGER_SILENCE)
    driver.open(4, run=run, ranks=[1])
    live(driver, run, [0, 3], MANAGER_SILENCE - 1)
    assert stop_of(driver.answer(await_stop(run, 0, patience=0))) is None, "back again, and watched since then"
    live(driver, run, [0, 3], 2)
    stop = stop_of(driver.answer(await_stop(run, 0, patience=0)))
    assert stop is not None
    assert stop.rank == 1


def test_a_generation_that_everyone_has_left_misses_nobody() -> None:
    driver, run = opened(2)
    driver.ask(await_stop(run, 0, patience=0))
    driver.ask(await_stop(run, 0, silence=None, patience=0))
    driver.wait(3 * MANAGER_SILENCE)
    assert stop_of(driver.answer(await_stop(run, 1, patience=0))) is None


def test_every_request_is_a_sign_of_life() -> None:
    driver, run = opened()
    driver.ask(await_stop(run, 1))
    for _ in range(5):
        live(driver, run, [0], SILENCE / 2)
        driver.ask(FromRank(run, 1, Heartbeat()))
    assert stop_of(driver.answer(await_stop(run, 0, patience=0))) is None


@pytest.mark.parametrize("by", ["leaving the run", "leaving the generation"])
def test_who_has_left_is_not_missed(by: str) -> None:
    driver, run = opened()
    for rank in (0, 1):
        driver.ask(await_stop(run, rank, patience=0))
    stays, goes = driver.ask(await_stop(run, 0)), driver.ask(await_stop(run, 1))
    if by == "leaving the run":
        driver.ask(FromRank(run, 1, Leave()))
        assert goes in driver.replies, "what it waits for is answered"
    else:
        driver.ask(await_stop(run, 1, silence=None, patience=0))
    assert driver.replies[stays] == StopState(None, {0: "host0", 1: None}), "others are told at once"
    driver.ask(await_stop(run, 1, silence=SILENCE))  # an older question, late
    live(driver, run, [0], 3 * SILENCE)
    assert stop_of(driver.answer(await_stop(run, 0, patience=0))) is None


def test_when_many_leave_only_a_few_are_told_at_once() -> None:
    world = 3 * TOLD_OF_LEAVING
    driver, run = opened(world)
    *others, own = [driver.ask(await_stop(run, rank)) for rank in range(world)]
    driver.ask(FromRank(run, world - 1, Leave()))
    assert own in driver.replies, "what it waits for itself is answered"
    assert len(driver.replies.keys() & set(others)) == TOLD_OF_LEAVING


def test_a_late_question_does_not_bring_a_rank_back_into_the_run() -> None:
    driver, run = opened(2)
    left = []
    driver.machine._saves.everyone_left = lambda: left.append(True)  # type: ignore[method-assign]
    driver.ask(await_stop(run, 0))
    driver.ask(FromRank(run, 0, Leave()))
    driver.ask(await_stop(run, 0))
    assert left == []
    driver.ask(FromRank(run, 1, Leave()))
    assert left == [True]


def test_nobody_is_missed_because_the_coordinator_stood_still() -> None:
    driver, run = opened()
    live(driver, run, [0, 1, 2], 3)
    driver.wait(5 * SILENCE)
    waiting = driver.ask(await_stop(run, 0))
    assert waiting not in driver.replies
    live(driver, run, [0, 1, 2], 2 * SILENCE)
    assert stop_of(driver.answer(await_stop(run, 0, patience=0))) is None
    live(driver, run, [0, 2], SILENCE)
    stop = stop_of(driver.answer(await_stop(run, 0, patience=0)))
    assert stop is not None
    assert stop.rank == 1


def test_silence_after_a_stop_is_no_news() -> None:
    driver, run = opened()
    driver.ask(await_stop(run, 1, known=FAILED, patience=0))
    live(driver, run, [0, 2], 3 * SILENCE)
    assert stop_of(driver.answer(await_stop(run, 0, patience=0))) == FAILED


# ---- a restart ----------------------------------------------------------------------------------------------------------


def test_after_a_restart_ranks_tell_again_what_they_know() -> None:
    driver, run = opened()
    driver.ask(await_stop(run, 1, known=FAILED, patience=0))
    other = driver.restarted("b")
    question = await_stop(run, 0, known=FAILED)
    assert isinstance(other.answer(question), Unknown)
    other.open(3, run=run, ranks=[0, 2])
    waiting = other.ask(await_stop(run, 2))
    other.ask(question)
    assert stop_of(other.replies[waiting]) == FAILED


def test_a_rank_that_dies_with_the_coordinator_is_missed_all_the_same() -> None:
    driver, run = opened()
    for rank in range(3):
        driver.ask(await_stop(run, rank, patience=0))
    known = cast(StopState, driver.answer(await_stop(run, 0, patience=0))).members
    other = driver.restarted("b")
    other.open(3, run=run, ranks=[0, 2])
    other.ask(await_stop(run, 0, members=known, patience=0))
    live(other, run, [0, 2], SILENCE - 1)
    assert stop_of(other.answer(await_stop(run, 0, patience=0))) is None
    live(other, run, [0, 2], 1)
    stop = stop_of(other.answer(await_stop(run, 0, patience=0)))
    assert stop is not None
    assert (stop.rank, stop.host) == (1, "host1")


def test_a_rank_that_left_before_the_coordinator_died_is_not_missed() -> None:
    driver, run = opened()
    for rank in range(3):
        driver.ask(await_stop(run, rank, patience=0))
    old = cast(StopState, driver.answer(await_stop(run, 2, patience=0))).members
    waiting = driver.ask(await_stop(run, 0))
    driver.ask(FromRank(run, 1, Leave()))
    new = cast(StopState, driver.replies[waiting]).members
    other = driver.restarted("b")
    other.open(3, run=run, ranks=[0, 2])
    for members in (old, new, old):
        other.ask(await_stop(run, 2, members=members, patience=0))
    live(other, run, [0, 2], 3 * SILENCE)
    assert stop_of(other.answer(await_stop(run, 0, patience=0))) is None


# ---- everything at once -------------------------------------------------------------------------------------------------


WORLD = 4
STEP = 0.25
RESEND = 3.0
LONG_SILENCE = 30.0


@dataclass
class Peer:
    """One rank. It asks, waits for an answer, asks again after a while, and opens its run again when it must."""

    rank: int
    members: Members = field(default_factory=dict)
    known: StopReport | None = None
    mine: StopReport | None = None
    told_at: float = math.inf
    asked_at: float = -math.inf
    up: bool = True
    left: bool = False
    opening: bool = False

    def question(self, run: int) -> OpenRun | FromRank:
        if self.opening:
            return OpenRun("job", self.rank, WORLD, f"host{self.rank}", "ckpt", Retention(), TIMEOUT, run)
        silence = None if self.left else LONG_SILENCE
        return await_stop(run, self.rank, 1, self.known or self.mine, self.members, silence)

    def hear(self, reply: Reply, now: float) -> None:
        self.asked_at = -math.inf
        if isinstance(reply, StopState):
            self.members = merged_members(self.members, reply.members)
            if self.known is None and reply.stop is not None:
                self.known, self.told_at = reply.stop, now
        else:
            assert isinstance(reply, Unknown | RunOpened), reply
            self.opening = isinstance(reply, Unknown)


class Network:
    """Carries questions and answers: late, twice, or never. What a coordinator has not answered dies with it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.driver = Driver().lead()
        self.run = self.driver.open(WORLD)
        self.peers = [Peer(rank, {rank: f"host{rank}"}) for rank in range(WORLD)]
        self.now = 0.0
        self._began = self.driver.mono
        self._going: list[tuple[float, Peer, OpenRun | FromRank]] = []
        self._coming: list[tuple[float, Peer, Reply]] = []
        self._asking: dict[int, Peer] = {}

    def restart(self, claim: str) -> None:
        self.driver = self.driver.restarted(claim)
        self._going.clear()
        self._asking.clear()

    def pass_time(self) -> None:
        for peer in self.peers:
            if peer.up and self.now - peer.asked_at > RESEND:
                peer.asked_at = self.now
                for _ in range(self.chance.choice([0, 1, 1, 1, 1, 2])):
                    self._going.append((self._arrival(), peer, peer.question(self.run)))
        for _, peer, question in self._due(self._going):
            self._asking[self.driver.ask(question)] = peer
        self.driver.settle()
        self.driver.wait(STEP)
        self.now = self.driver.mono - self._began
        for ticket in self._asking.keys() & self.driver.replies.keys():
            peer = self._asking.pop(ticket)
            if self.chance.random() < 0.9:
                self._coming.append((self._arrival(), peer, self.driver.replies[ticket]))
        for _, peer, reply in self._due(self._coming):
            if peer.up:
                peer.hear(reply, self.now)

    def _arrival(self) -> float:
        return self.now + self.chance.choice([0, 0, 0, 0.5, 2.0])

    def _due(self, way: list[Any]) -> list[Any]:
        due = [entry for entry in way if entry[0] <= self.now]
        way[:] = [entry for entry in way if entry[0] > self.now]
        return due


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("trouble", ["report", "death", "death with the coordinator", "leave"])
def test_whatever_is_lost_doubled_late_or_restarted(trouble: str, seed: int) -> None:
    """A stop reaches everyone who lives, soon; nobody who lives is missed; a rank that dies is, with its host."""
    network = Network(seed)
    chance = network.chance
    victim = network.peers[chance.randrange(WORLD)]
    at = chance.uniform(15, 25)
    restarts = [chance.uniform(2, 40) for _ in range(chance.randrange(3))]
    restarts += [at] * (trouble == "death with the coordinator")
    happened = False
    while network.now < 120:
        if not happened and network.now >= at:
            happened = True
            victim.up, victim.left = not trouble.startswith("death"), trouble == "leave"
            victim.mine = StopReport(victim.rank, f"host{victim.rank}", "E") if trouble == "report" else None
        for moment in [moment for moment in restarts if moment <= network.now]:
            restarts.remove(moment)
            network.restart(f"{len(restarts)}")
        network.pass_time()
    others = [peer for peer in network.peers if peer is not victim]
    if trouble == "leave":
        assert [peer.known for peer in others] == [None] * 3
        return
    stops = [cast(StopReport, peer.known) for peer in others]
    assert {(stop.rank, stop.host) for stop in stops} == {(victim.rank, f"host{victim.rank}")}
    assert {stop.silent is not None for stop in stops} == {trouble != "report"}
    waited = [peer.told_at - at for peer in others]
    if trouble == "report":
        assert max(waited) < 30
    else:
        assert LONG_SILENCE - 10 < min(waited) <= max(waited) < LONG_SILENCE + 40
