"""Restores that ranks hold by themselves: rank 0 decides, by a consultation of all ranks. Ranks are threads here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

import distckpt
from distckpt.coordinator.client.gathering import Gathering
from distckpt.coordinator.messages import (
    FillFrom,
    FinishWith,
    KeyMatch,
    MatchWith,
    Mismatched,
    Restore,
    Restored,
    RunOpened,
)
from distckpt.directory.log import read_tail
from distckpt.errors import AbsentRanksError, CheckpointNotFoundError, MissingRanksError, RestoreError, StaleRunError
from distckpt.format import names
from distckpt.storage import open_store
from distckpt.world import Council, StoreCouncil

FITS = KeyMatch(bytes(1), matched=1)
NOTHING_FITS = KeyMatch(b"\x80", matched=0, missing=("b",), missing_count=1)


@dataclass
class NotYet:
    """A run that is open or not; ``wait`` is what opening it does."""

    wait: Callable[[], object] = lambda: None
    opened: RunOpened | None = None

    def open(self) -> object:
        """Wait."""
        return self.wait()


class Ranks:
    """Two threads that consult each other, each with a gathering of its own."""

    def __init__(self, directory: Path, timeout: float = 20.0, opening: NotYet | None = None) -> None:
        torch_store = HashStore()
        self.councils = [StoreCouncil(torch_store, rank, 2, timeout) for rank in range(2)]
        store = open_store(directory)
        hosts = {0: "left", 1: "right"}
        self.gatherings = [
            Gathering(council, store, "ckpt", hosts, timeout, opening or NotYet()) for council in self.councils
        ]
        self._pool = ThreadPoolExecutor(2)

    def ask(self, *requests: Restore) -> list[Any]:
        """What each rank is answered, or the error that it gets. One request is said by both."""
        both = requests if len(requests) == 2 else requests * 2
        return list(self._pool.map(self._ask, self.gatherings, both))

    @staticmethod
    def _ask(gathering: Gathering, request: Restore) -> Any:
        try:
            return gathering.ask(request, 20)
        except distckpt.errors.DistckptError as error:
            return error


def save(directory: Path, *numbers: int) -> None:
    """Commit these, of one rank."""
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), directory) as manager:
        for number in numbers:
            manager.save(number).result(30)


def tried(attempt: str, **rest: Any) -> Restore:
    """A report on an attempt."""
    return Restore(1, None, tried=attempt, **rest)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(tmp_path, 1, 2)
    return tmp_path


def test_both_match_then_both_fill_and_the_end_is_the_same(directory: Path) -> None:
    ranks = Ranks(directory)
    first, other = ranks.ask(Restore(1, None))
    assert isinstance(first, MatchWith)
    assert first == other
    assert first.record.number == 2
    assert ranks.ask(tried(first.record.attempt, keys=FITS)) == [FillFrom(first.record)] * 2
    assert ranks.ask(tried(first.record.attempt, stage="fill")) == [FinishWith(first.record, FITS)] * 2
    assert ranks.ask(tried(first.record.attempt, stage="finish")) == [Restored(first.record), Restored(first.record)]


def test_what_one_rank_finds_damaged_all_leave(directory: Path) -> None:
    ranks = Ranks(directory)
    newest = ranks.ask(Restore(1, None))[0].record
    older, same = ranks.ask(tried(newest.attempt, keys=FITS), tried(newest.attempt, refused="flipped"))
    assert older == same
    assert older.record.number == 1
    assert older.refused == ((f"{directory}/ckpt-2", "rank 1 (right): flipped"),)


def test_what_fits_nobody_is_over_for_both(directory: Path) -> None:
    ranks = Ranks(directory)
    newest = ranks.ask(Restore(1, None))[0].record
    answers = ranks.ask(tried(newest.attempt, keys=NOTHING_FITS))
    assert answers == [Mismatched(newest, NOTHING_FITS)] * 2


def test_an_error_of_one_rank_ends_it_for_both(directory: Path) -> None:
    ranks = Ranks(directory)
    newest = ranks.ask(Restore(1, None))[0].record
    told, _ = ranks.ask(tried(newest.attempt, keys=FITS), tried(newest.attempt, failed="no memory"))
    assert str(told) == f"{directory}: rank 1 (right) failed: no memory"
    assert isinstance(ranks.ask(Restore(2, None))[0], MatchWith), "the next one begins afresh"


@pytest.mark.parametrize("who", [0, 1])
def test_who_comes_after_another_has_failed_is_told_so_once(directory: Path, who: int) -> None:
    ranks = Ranks(directory)
    failed, late = ranks.gatherings[who], ranks.gatherings[1 - who]
    for reason in ("KeyboardInterrupt", "no memory"):
        with pytest.raises(RestoreError):
            failed.ask(Restore(1, None, failed=reason), 20)
        with pytest.raises(RestoreError, match=f"rank {who} .* failed: {reason}"):
            late.ask(Restore(1, None), 20)
        assert isinstance(ranks.ask(Restore(2, None))[1 - who], MatchWith)


def test_a_rank_that_begins_again_while_the_other_is_at_work_is_not_taken_for_the_one_before(directory: Path) -> None:
    ranks = Ranks(directory)
    newest = ranks.ask(Restore(1, None))[0].record
    ranks.ask(tried(newest.attempt, keys=FITS))
    answers = ranks.ask(tried(newest.attempt, stage="fill"), Restore(2, None))
    assert ["rank 1 (right) has begun another restore" in str(answer) for answer in answers] == [True, True]
    assert isinstance(ranks.ask(Restore(3, None))[0], MatchWith)


class Slow:
    """A torch store that does something the first time that a key is found."""

    def __init__(self, inner: HashStore, key: str, then: Callable[[], object]) -> None:
        self._inner = inner
        self._key = key
        self._then: Callable[[], object] | None = then

    def check(self, keys: list[str]) -> bool:
        """See torch's."""
        found = bool(self._inner.check(keys))
        if found and self._key in keys and self._then is not None:
            then, self._then = self._then, None
            then()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_who_comes_back_just_when_the_word_that_he_left_is_read_is_not_waited_for() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=2))
    other = StoreCouncil(store, 1, 2, 20)
    other.refuse("no memory")
    with ThreadPoolExecutor(1) as pool:

        def come_back() -> None:
            pool.submit(other.consult, "here", " and ".join)
            while not store.check(["call/1/1"]):
                time.sleep(0.001)

        first = StoreCouncil(Slow(store, "refusal/1", come_back), 0, 2, 20)
        assert first.consult("here too", " and ".join) == "here too and here"


def test_ranks_need_not_have_restored_equally_often(directory: Path) -> None:
    ranks = Ranks(directory)
    first, second = ranks.ask(Restore(1, None), Restore(5, None))
    assert first == second
    assert isinstance(first, MatchWith)


def test_what_is_not_there_is_said_to_both(directory: Path) -> None:
    answers = Ranks(directory).ask(Restore(1, 7))
    assert [type(answer) for answer in answers] == [CheckpointNotFoundError] * 2
    assert answers[1].path == f"{directory}/ckpt-7"


def test_there_is_nothing_to_restore_in_a_fresh_directory(tmp_path: Path) -> None:
    assert Ranks(tmp_path).ask(Restore(1, None)) == [Restored(None)] * 2


def test_what_is_being_restored_is_leased_until_it_is_over(directory: Path) -> None:
    ranks, store = Ranks(directory), open_store(directory)
    newest = ranks.ask(Restore(1, None))[0].record
    assert len(list(store.list(names.LEASES))) == 1
    older = ranks.ask(tried(newest.attempt, refused="flipped"))[0].record
    assert len(list(store.list(names.LEASES))) == 1
    ranks.ask(tried(older.attempt, keys=FITS))
    ranks.ask(tried(older.attempt, stage="fill"))
    ranks.ask(tried(older.attempt, stage="finish"))
    assert not list(store.list(names.LEASES))


def test_a_checkpoint_that_is_committed_meanwhile_is_restored_instead(directory: Path) -> None:
    ranks = Ranks(directory)
    record = ranks.ask(Restore(1, None))[0].record
    ranks.ask(tried(record.attempt, keys=FITS))
    ranks.ask(tried(record.attempt, stage="fill"))
    save(directory, 3)
    newer = ranks.ask(tried(record.attempt, stage="finish"))[0]
    assert isinstance(newer, MatchWith)
    assert newer.record.number == 3


def test_a_run_that_restored_before_an_earlier_one_committed_is_told(directory: Path) -> None:
    ranks = Ranks(directory)
    gathering = ranks.gatherings[1]
    gathering.check_newest()
    record = ranks.ask(Restore(1, None))[0].record
    ranks.ask(tried(record.attempt, keys=FITS))
    ranks.ask(tried(record.attempt, stage="fill"))
    ranks.ask(tried(record.attempt, stage="finish"))
    gathering.check_newest()
    save(directory, 3)
    with pytest.raises(RestoreError, match="start it again"):
        gathering.check_newest()


def test_a_run_that_was_superseded_while_it_restored_is_told_at_once(directory: Path) -> None:
    state = read_tail(open_store(directory)).state
    ranks = Ranks(directory, opening=NotYet(opened=RunOpened(state.run, 1, None)))
    record = ranks.ask(Restore(1, None))[0].record
    ranks.ask(tried(record.attempt, keys=FITS))
    ranks.ask(tried(record.attempt, stage="fill"))
    save(directory)  # a newer run begins
    answers = ranks.ask(tried(record.attempt, stage="finish"))
    assert [type(answer) for answer in answers] == [StaleRunError] * 2
    assert (answers[1].run, answers[1].newer) == (state.run, state.run + 1)


def test_what_lacks_nothing_but_its_commit_waits_for_a_coordinator(directory: Path) -> None:
    entry = max((directory / "_log").iterdir())
    text = entry.read_bytes()
    entry.unlink()
    assert read_tail(open_store(directory)).state.newest().number == 1  # type: ignore[union-attr]
    ranks = Ranks(directory, opening=NotYet(lambda: entry.write_bytes(text)))  # a coordinator would roll it forward
    assert ranks.ask(Restore(1, None))[0].record.number == 2


def test_a_rank_that_does_not_come_is_named(directory: Path) -> None:
    ranks = Ranks(directory, timeout=0.5)
    with pytest.raises(MissingRanksError, match=r"rank 1 \(right\)"):
        ranks.gatherings[0].ask(Restore(1, None), 1)


def test_a_rank_that_takes_its_time_and_gives_signs_is_waited_for(directory: Path) -> None:
    ranks = Ranks(directory, timeout=1.0)
    come = threading.Event()
    answers: list[Any] = []

    def late() -> None:
        newest = ranks.ask(Restore(1, None))[0].record  # from here on both give signs
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ranks.gatherings[0].ask, tried(newest.attempt, keys=FITS), 1)
            come.wait(3)
            answers.append(ranks.gatherings[1].ask(tried(newest.attempt, keys=FITS), 1))
            answers.append(waiting.result(10))

    late()
    assert [type(answer) for answer in answers] == [FillFrom] * 2


# ---- what ranks can do together --------------------------------------------------------------------------------------


def together(*calls: Callable[[], str]) -> list[str]:
    """What each returns, called at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(20) for future in [pool.submit(call) for call in calls]]


def test_rank_0_answers_what_all_say() -> None:
    store = HashStore()
    councils = [StoreCouncil(store, rank, 3, 20) for rank in range(3)]
    for _ in range(2):
        answers = together(
            *(
                lambda rank=rank, council=council: council.consult(f"{rank}", ",".join)
                for rank, council in enumerate(councils)
            )  # type: ignore[misc]
        )
        assert answers == ["0,1,2"] * 3


def test_conversations_that_are_apart_do_not_meet() -> None:
    store = HashStore()
    councils: list[Council] = [StoreCouncil(store, rank, 2, 20) for rank in range(2)]
    one, other = councils[0], councils[1]
    answers = together(
        lambda: one.apart("a").consult("first", ",".join),
        lambda: one.apart("b", behind=True).consult("second", ",".join),
        lambda: other.apart("b", behind=True).consult("second", ",".join),
        lambda: other.apart("a").consult("first", ",".join),
    )
    assert answers == ["first,first", "second,second", "second,second", "first,first"]


def test_a_call_that_was_given_up_is_passed_over() -> None:
    store = HashStore()
    zero, one = (StoreCouncil(store, rank, 2, 0.3) for rank in range(2))
    with pytest.raises(AbsentRanksError, match="rank 0"):
        one.consult("alone", ",".join, -0.9)
    assert together(lambda: zero.consult("0", ",".join, 20), lambda: one.consult("1", ",".join, 20)) == ["0,1", "0,1"]
