"""What is around the machine: when something in it fails, or the store hangs, everyone who waits is told, and it goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt.coordinator.messages import (
    AwaitPlan,
    Describe,
    FromRank,
    Join,
    Joined,
    Late,
    OpenRun,
    Receipt,
    Refused,
    Reply,
    Request,
    Restore,
    RunOpened,
    Unknown,
)
from distckpt.coordinator.shell.shell import Settings, Shell
from distckpt.errors import CoordinatorFailedError, MissingRanksError
from distckpt.keep import Retention
from distckpt.storage import LocalStore
from tests.support.small_runs import Trainer, assert_loads, assert_sound_log, numbers


class Once:
    """Memory is short the first time that it is asked for, once ``armed``."""

    def __init__(self) -> None:
        self.armed = False

    def pass_by(self) -> None:
        """A moment passes."""
        if self.armed:
            self.armed = False
            raise MemoryError("no room")


class Count(int):
    """A number that may be short of memory when it is rounded: ``max_to_keep`` is, in the machine, at a commit."""

    once: Once

    def __floor__(self) -> int:
        self.once.pass_by()
        return int(self)


class Seconds(float):
    """Seconds that may be short of memory when they are told: a deadline's are, in the machine, when it has passed."""

    once: Once

    def __format__(self, spec: str) -> str:
        self.once.pass_by()
        return format(float(self), spec)


@pytest.fixture
def once() -> Iterator[Once]:
    Count.once = Seconds.once = Once()
    return Count.once


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The errors that were logged with a traceback."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR and record.exc_info]


def test_an_exception_in_the_machine_is_logged_and_refuses_the_save_and_the_next_one_works(
    tmp_path: Path, once: Once, caplog: pytest.LogCaptureFixture
) -> None:
    with Trainer(tmp_path, max_to_keep=Count(1), save_timeout=30) as trainer:
        once.armed = True
        error = trainer.save(1).exception(20)
        assert isinstance(error, CoordinatorFailedError)
        assert "MemoryError: no room" in str(error)
        assert str(error) in told(caplog)
        trainer.saved(2)
    assert not once.armed
    assert numbers(tmp_path) == [2]
    assert_loads(tmp_path / "ckpt-2", 2)
    claims = [entry for entry in assert_sound_log(tmp_path) if entry.kind == "claim"]
    assert len(claims) == 2, "it has started again from the log"


class Ranks:
    """Two ranks of one run, whose words the test says, before a coordinator in this process."""

    def __init__(self, directory: Path, save_timeout: float) -> None:
        self.entries: list[int] = []
        self.shell = Shell(LocalStore(directory), Settings(), on_entry=self.entries.append)
        self.shell.start()
        self._save_timeout = save_timeout

    def open(self, run: int = 0) -> int:
        """Both report; their run."""
        asked = [
            self.shell.submit(OpenRun("job", rank, 2, f"host{rank}", "ckpt", Retention(), self._save_timeout, run))
            for rank in range(2)
        ]
        opened = [future.result(20) for future in asked]
        assert all(isinstance(one, RunOpened) for one in opened), opened
        assert isinstance(opened[0], RunOpened)
        return opened[0].run

    def say(self, run: int, rank: int, request: Any) -> Reply:
        """What a rank is told, in the end."""
        while isinstance(reply := self.shell.submit(FromRank(run, rank, request)).result(20), Late):
            pass
        return reply

    def close(self) -> None:
        """End the coordinator."""
        self.shell.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path, Seconds(0.3))
    yield ranks
    ranks.close()


def test_an_exception_at_a_deadline_refuses_who_waits_and_deadlines_are_kept_again(
    two: Ranks, once: Once, caplog: pytest.LogCaptureFixture
) -> None:
    run = two.open()
    joined = two.say(run, 0, Join(1, 1, "digest"))
    assert isinstance(joined, Joined)
    once.armed = True
    waits = two.say(run, 0, AwaitPlan(joined.attempt))
    assert isinstance(waits, Refused)
    assert isinstance(waits.error, CoordinatorFailedError)
    assert str(waits.error) in told(caplog)
    assert two.say(run, 0, Join(2, 2, "digest")) == Unknown()
    assert two.open(run) == run
    joined = two.say(run, 0, Join(2, 2, "digest"))
    assert isinstance(joined, Joined)
    waits = two.say(run, 0, AwaitPlan(joined.attempt))
    assert isinstance(waits, Refused)
    assert isinstance(waits.error, MissingRanksError)


@pytest.mark.parametrize(
    "request_",
    [Restore([], None), Join("1", 1, "digest"), Describe("x", "d", 3), Receipt([], ())],  # type: ignore[arg-type,list-item]
    ids=lambda request: type(request).__name__,
)
def test_a_request_that_the_machine_cannot_take_is_refused_and_others_go_on(two: Ranks, request_: Request) -> None:
    run = two.open()
    reply = two.say(run, 0, request_)
    assert isinstance(reply, Refused | Unknown)
    if isinstance(reply, Refused):
        assert isinstance(reply.error, CoordinatorFailedError)
    two.open(run)
    assert isinstance(two.say(run, 0, Join(1, 1, "digest")), Joined)


def test_who_waits_while_another_ones_request_fails_is_told(two: Ranks) -> None:
    run = two.open()
    joined = two.say(run, 0, Join(1, 1, "digest"))
    assert isinstance(joined, Joined)
    waiting = two.shell.submit(FromRank(run, 0, AwaitPlan(joined.attempt)))
    two.say(run, 1, Restore([], None))  # type: ignore[arg-type]
    reply = waiting.result(20)
    assert isinstance(reply, Refused)
    assert isinstance(reply.error, CoordinatorFailedError)


def test_whoever_follows_the_log_is_told_of_each_entry(two: Ranks, tmp_path: Path) -> None:
    two.open()
    assert two.entries == numbers_of_entries(tmp_path) != []


def numbers_of_entries(directory: Path) -> list[int]:
    return [entry.seq for entry in assert_sound_log(directory)]
