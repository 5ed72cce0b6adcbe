"""Who needs what, as the shell reads it while workers go on, and what it does with reports and lagging groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from distckpt.coordinator.machine.actions import ReadLeases, TellSkips
from distckpt.coordinator.shell.needs import Needs, delete_reports, tell_skips
from distckpt.directory.groups import read_groups
from distckpt.directory.log import read_tail
from distckpt.directory.reports import read_reports, write_report
from distckpt.evaluation.watch import watch
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import MemoryStore, ObjectInfo
from distckpt.testing.faulty import Call, Fault, FaultyStore
from tests.support.checkpoints import commit, new_attempt, put_manifest
from tests.support.small_runs import mount, mounting


@pytest.fixture(autouse=True)
def mountable() -> Iterator[None]:
    with mounting():
        yield


class Watched(MemoryStore):
    """Does something after each listing."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[str], object] = lambda folder: None

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        found = list(super().list(folder))
        self.then(folder)
        return iter(found)


def committed(store: MemoryStore, count: int) -> list[CheckpointRecord]:
    for number in range(1, count + 1):
        commit(store, put_manifest(store, number, new_attempt()))
    return list(read_tail(store).state.active)


def state_of(store: MemoryStore) -> State:
    return read_tail(store).state


def test_what_a_group_is_done_with_has_been_reported_by_the_time_that_is_known() -> None:
    """A worker reports and acknowledges after each listing in turn, whatever was listed."""
    for moment in range(12):
        store = Watched()
        committed(store, 1)
        worker = watch(mount(store), group="eval", mode="all", timeout=0)
        checkpoint = next(worker)
        left = [moment]

        def then(folder: str, checkpoint: object = checkpoint, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                checkpoint.report({"loss": 1.0})  # type: ignore[attr-defined]
                checkpoint.ack()  # type: ignore[attr-defined]

        store.then = then
        found = Needs(store).read(ReadLeases(state_of(store)))
        assert not found.failed
        [group] = found.followed.groups
        assert group.wanted or found.reports, moment


def test_of_an_attempt_no_report_is_deleted_after_one_that_stays() -> None:
    attempts = [new_attempt(), new_attempt()]
    inner = MemoryStore()
    for attempt in attempts:
        for loss in (1.0, 2.0):
            write_report(inner, attempt, {"loss": loss})
    reports = read_reports(inner).found
    first = next(one for one in reports if one.report.attempt == attempts[0])

    class Script:
        def fault(self, call: Call) -> Fault | None:
            return Fault.BEFORE if call.path == first.path else None

    delete_reports(FaultyStore(inner, Script()), reports)
    assert [one.report.metrics["loss"] for one in read_reports(inner, attempts[0]).found] == [1.0, 2.0]
    assert read_reports(inner, attempts[1]).found == ()


def test_a_group_is_told_what_it_does_not_get_and_one_that_is_gone_is_not_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()
    records = committed(store, 3)
    assert watch(mount(store), group="eval", mode="all", max_backlog=1, timeout=0) is not None
    next(watch(mount(store), group="eval", mode="all", timeout=0)).release()
    with caplog.at_level(logging.WARNING):
        assert tell_skips(store, TellSkips({"eval": tuple(records[1:2])})).done
        assert not tell_skips(store, TellSkips({"nobody": tuple(records[:1])})).done
    assert "the group eval lags, and does not get ckpt-2" in caplog.text
    assert read_groups(store)["eval"].skipped == 1
    [group] = Needs(store).read(ReadLeases(state_of(store))).followed.groups
    assert group.waiting == (records[0].attempt, records[2].attempt)


def test_a_group_that_rules_name_and_nobody_has_begun_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    needs = Needs(store)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not needs.read(ReadLeases(State(), frozenset({"eval"}))).failed
    assert caplog.text.count("no worker has begun the group 'eval' yet") == 1


def test_a_report_that_cannot_be_read_is_said_once_and_its_attempt_is_unclear(caplog: pytest.LogCaptureFixture) -> None:
    store, attempt = MemoryStore(), new_attempt()
    store.put_if_absent(names.report_path(attempt, "0" * 32), b"damaged")
    needs = Needs(store)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert needs.read(ReadLeases(State())).followed.unclear == {attempt}
    assert caplog.text.count("a report cannot be read") == 1
