"""Saves that fail while training goes on, because the manager was told that they may."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import DistckptError, FencedError, StaleRunError, StorageError
from distckpt.storage import LocalStore
from distckpt.testing.faulty import Call, Fault, FaultyStore
from tests.support.gang import Gang
from tests.support.small_runs import mount, mounting, numbers, until


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[FaultyStore, str]]:
    """A store in ``tmp_path`` and the URL of it."""
    store = FaultyStore(LocalStore(tmp_path))
    with mounting():
        yield store, mount(store)


class Broken:
    """The shards of those checkpoints cannot be written."""

    def __init__(self, *which: int, name: str = "ckpt") -> None:
        self._folders = tuple(f"{name}-{number}/" for number in which)

    def fault(self, call: Call) -> Fault | None:
        return Fault.BEFORE if call.operation == "put_unique" and call.path.startswith(self._folders) else None


def save_all(manager: distckpt.CheckpointManager, *which: int) -> None:
    """Save under those numbers one after the other, each when the one before has ended."""
    for number in which:
        pending = manager.save(number)
        assert pending is not None
        until(pending.done)


def manager_at(url: str, allowed: int, **options: Any) -> distckpt.CheckpointManager:
    state = {"weight": torch.ones(4)}
    return distckpt.CheckpointManager(
        distckpt.Checkpoint(state=state), url, max_to_keep=None, save_failures_allowed=allowed, **options
    )


def test_failures_in_a_row_are_logged_up_to_the_number_that_is_allowed(
    faulty: tuple[FaultyStore, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, url = faulty
    store.script = Broken(2, 3, 5, 6, 7)
    manager = manager_at(url, 2)
    with caplog.at_level(logging.ERROR, "distckpt"):
        save_all(manager, 1, 2, 3, 4, 5, 6)
    said = [record.getMessage() for record in caplog.records if "training goes on" in record.getMessage()]
    found = [re.search(r"/(ckpt-\d) was not saved.* (\d) of 2 failures", text) for text in said]
    assert [match and match.groups() for match in found] == [
        *(("ckpt-2", "1"), ("ckpt-3", "2"), ("ckpt-5", "1"), ("ckpt-6", "2"))
    ]
    save_all(manager, 7)
    with pytest.raises(DistckptError, match="the call failed"):
        manager.save(8)
    manager.wait()
    manager.close()
    assert numbers(tmp_path) == [1, 4, 8]


@pytest.mark.parametrize("ends", ["wait", "close"])
def test_what_has_failed_last_is_raised_at_the_end(faulty: tuple[FaultyStore, str], ends: str) -> None:
    store, url = faulty
    store.script = Broken(1, 3)
    manager = manager_at(url, 5)
    save_all(manager, 1, 2)
    manager.wait()
    save_all(manager, 3)
    with pytest.raises(DistckptError, match="the call failed"):
        getattr(manager, ends)()
    manager.close()


def test_whoever_asks_for_a_result_is_told_of_a_failure_that_is_allowed(faulty: tuple[FaultyStore, str]) -> None:
    store, url = faulty
    store.script = Broken(1)
    with manager_at(url, 1) as manager:
        pending = manager.save(1)
        assert pending is not None
        with pytest.raises(DistckptError, match="the call failed"):
            pending.result(30)


def test_a_newer_run_is_no_failure_that_may_be_passed_over(tmp_path: Path) -> None:
    old = manager_at(str(tmp_path), 10)
    old.prepare()
    manager_at(str(tmp_path), 0).close()
    save_all(old, 1)
    with pytest.raises((FencedError, StaleRunError)):
        old.save(2)
    with pytest.raises((FencedError, StaleRunError)):
        old.close()


def test_a_hook_goes_on_after_a_failure_that_is_allowed(faulty: tuple[FaultyStore, str], tmp_path: Path) -> None:
    store, url = faulty
    store.script = Broken(1, 2)
    state = {"step": 0}
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(state=state), url, max_to_keep=None, save_failures_allowed=2
    ) as manager:
        hook = distckpt.CheckpointSaverHook(manager.directory, save_steps=1, saver=manager)
        loop = distckpt.HookedLoop([hook], lambda: state["step"])
        loop.begin()
        for _ in range(4):
            loop.before_step()
            state["step"] += 1
            loop.after_step()
            until(lambda: all(pending.done() for pending in manager._pending))
        loop.end()
        loop.close()
    assert numbers(tmp_path) == [0, 3, 4]


@pytest.mark.parametrize("allowed", [0, 1])
def test_ranks_go_on_together(gang2: Gang, tmp_path: Path, allowed: int) -> None:
    results = gang2.run("ranks.manager:save_on_a_bad_store", directory=str(tmp_path), fails_at=2, allowed=allowed)
    assert results == [["begun", "begun", "begun" if allowed else "raised", "begun"]] * 2
    assert numbers(tmp_path) == [1, 3, 4]


def test_a_negative_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_failures_allowed"):
        manager_at(str(tmp_path / "run"), -1)


def test_a_store_that_cannot_be_used_at_all_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        manager_at(str(tmp_path / "file" / "run"), 5).prepare()
