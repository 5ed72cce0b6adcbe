"""Readers of a run and what retention does for them, with real managers, groups and reports."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli import main
from distckpt.directory.groups import read_groups
from distckpt.directory.reports import read_reports, write_report
from distckpt.format import names
from distckpt.format.json.group import GroupEntry, GroupState
from distckpt.format.json.sealed import unseal
from distckpt.storage import LocalStore
from distckpt.testing.faulty import FaultyStore
from tests.support import crashing
from tests.support.damage import copied
from tests.support.small_runs import Trainer, entries, mount, mounting, numbers, on_disk, records, run, settled, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator looks soon again."""
    monkeypatch.setattr("distckpt.coordinator.machine.keeping.LOOK_AGAIN", 0.1)
    monkeypatch.setattr("distckpt.coordinator.machine.keeping.LAG_AGAIN", 0.02)


def watch(directory: Path, **options: Any) -> Iterator[Any]:
    return distckpt.watch(directory, **{"group": "eval", "mode": "all", "timeout": 0, **options})


def begin(directory: Path, **options: Any) -> None:
    """A worker makes the group, finds nothing to do, and goes."""
    run(directory)
    assert list(watch(directory, **options)) == []


def group(directory: Path) -> GroupState:
    return read_groups(LocalStore(directory))["eval"]


def reports(directory: Path) -> list[str]:
    """The attempts on which reports lie that are not in the log."""
    return sorted(one.report.attempt for one in read_reports(LocalStore(directory)).found)


def told(directory: Path) -> dict[int, dict[str, float]]:
    """The metrics that a reader is told of, wherever they are."""
    found = {}
    for record in records(directory):
        with distckpt.open(directory / f"ckpt-{record.number}") as reader:
            found[record.number] = dict(reader.metrics)
    return found


def metrics(directory: Path) -> dict[int, dict[str, float]]:
    return {record.number: record.metrics for record in records(directory) if record.metrics}


def test_a_group_that_lags_loses_the_oldest_and_its_record_says_so_before_they_go(tmp_path: Path) -> None:
    begin(tmp_path, max_backlog=2, on_lag="skip")
    run(tmp_path, 1, 2, 3, 4, 5, max_to_keep=1)
    settled(tmp_path)
    state = group(tmp_path)
    assert (numbers(tmp_path), on_disk(tmp_path)) == ([4, 5], [4, 5])
    assert (state.skipped, state.missed) == (3, 0)
    assert state.last_skipped is not None
    assert state.last_skipped.number == 3
    assert [checkpoint.number for checkpoint in acknowledged(watch(tmp_path))] == [4, 5]


def acknowledged(found: Iterator[Any]) -> Iterator[Any]:
    for checkpoint in found:
        with checkpoint:
            yield checkpoint


def test_everything_is_held_for_a_group_and_goes_when_it_is_done(tmp_path: Path) -> None:
    begin(tmp_path, max_backlog=1, on_lag="hold")
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        for number in (1, 2, 3):
            trainer.saved(number)
        assert numbers(tmp_path) == [1, 2, 3]
        assert [checkpoint.number for checkpoint in acknowledged(watch(tmp_path))] == [1, 2, 3]
        assert until(lambda: on_disk(tmp_path) == [3]), "without any save"


def test_a_save_waits_for_a_group_that_blocks_and_so_does_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.coordinator.machine.backpressure.REMIND_SECONDS", 0.05)
    begin(tmp_path, max_backlog=1, on_lag="block")
    with caplog.at_level(logging.WARNING), Trainer(tmp_path, save_timeout=5) as trainer:
        trainer.saved(1)
        pending = trainer.save(2)
        assert until(lambda: "the save waits for the group 'eval'" in caplog.text)
        assert "make an end of it: delete _groups/eval" in caplog.text
        assert not pending.done()
        trainer.manager._patience = 2.0
        two = itertools.islice(watch(tmp_path, timeout=30), 2)
        worker = threading.Thread(target=lambda: [str(one) for one in acknowledged(two)])
        closing = threading.Thread(target=trainer.manager.close)
        closing.start()
        closing.join(2.5)
        assert closing.is_alive(), "it waits for readers for longer than for a store"
        worker.start()
        closing.join(30)
        assert pending.result(0).endswith("ckpt-2")
        worker.join(30)
    committed = next(entry.time for entry in entries(tmp_path) if entry.state.commits == 2)
    assert first_acknowledgement(tmp_path) <= committed
    assert numbers(tmp_path) == [1, 2]


def first_acknowledgement(directory: Path) -> float:
    chain = sorted((directory / names.GROUPS / "eval").glob("*.json"))
    found = [unseal(path.read_bytes(), GroupEntry, "x", GroupEntry.MAX_BYTES) for path in chain]
    return next(entry.time for entry in found if entry.kind == "ack")


def test_the_best_stay_also_if_reports_come_late_and_none_goes_unjudged(tmp_path: Path) -> None:
    keep = distckpt.BestN(1, metric="loss", mode="min", group="eval") | distckpt.LatestN(1)
    begin(tmp_path, max_backlog=1, on_lag="hold")
    with Trainer(tmp_path, keep=keep) as trainer:
        for number in (1, 2, 3, 4):
            trainer.saved(number)
        assert numbers(tmp_path) == [1, 2, 3, 4]
        for checkpoint in acknowledged(watch(tmp_path)):
            checkpoint.report({"loss": {1: 3.0, 2: 0.5, 3: 2.0, 4: 1.0}[checkpoint.number]})
        assert until(lambda: on_disk(tmp_path) == [2, 4])
        assert told(tmp_path) == {2: {"loss": 0.5}, 4: {"loss": 1.0}}
    run(tmp_path, 5, keep=keep)
    assert numbers(tmp_path) == [2, 5]
    assert (metrics(tmp_path), reports(tmp_path)) == ({2: {"loss": 0.5}}, []), (
        "the log has them, or they are of nothing"
    )


def test_a_group_that_cannot_be_read_lets_nothing_go_and_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / names.GROUPS / "eval"
    folder.mkdir(parents=True)
    entry = folder / f"{1:020d}.json"
    entry.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING), Trainer(tmp_path, max_to_keep=1) as trainer:
        for number in (1, 2, 3):
            trainer.saved(number)
        assert numbers(tmp_path) == [1, 2, 3]
        assert caplog.text.count("nothing is deleted while") == 1
        entry.unlink()
        assert until(lambda: on_disk(tmp_path) == [3])


def test_gc_deletes_reports_on_what_is_gone(tmp_path: Path) -> None:
    run(tmp_path, 1)
    store, [record] = LocalStore(tmp_path), records(tmp_path)
    gone = f"e1-{'0' * 32}"
    for attempt in (gone, record.attempt):
        write_report(store, attempt, {"loss": 1.0})
    run(tmp_path)  # a later epoch
    assert CliRunner().invoke(main, ["gc", str(tmp_path), "--older-than", "0", "--force"]).exit_code == 0
    assert reports(tmp_path) == [record.attempt]


def test_wherever_a_coordinator_dies_a_report_is_told_and_the_later_one_counts(tmp_path: Path) -> None:
    """Between a report, the entry that has it, and the deletion of what the entry has."""
    template = tmp_path / "template"
    run(template, 1)
    store, [record] = LocalStore(template), records(template)
    for loss in (1.0, 2.0):
        write_report(store, record.attempt, {"loss": loss})
    first, last = moments_of_folding(copied(template, tmp_path, "quiet"))
    for at in range(first, last + 1):
        directory = copied(template, tmp_path, f"run-{at}")
        crashing.run(crashing.save_and_die, directory=str(directory), numbers=[2], count="calls", at=at)
        listed = json.loads(CliRunner().invoke(main, ["ls", str(directory), "--json"]).stdout)["checkpoints"]
        assert listed[0]["metrics"] == {"loss": 2.0}, at
        run(directory, 3)
        assert metrics(directory)[1] == {"loss": 2.0}, at
        assert reports(directory) == [], at


def moments_of_folding(directory: Path) -> tuple[int, int]:
    """The store calls of a quiet run, from the first look at the reports to the last deletion of one."""
    store = FaultyStore(LocalStore(directory))
    with mounting(), Trainer(mount(store)) as trainer:
        trainer.saved(2)
    touching = [call.index for call in store.calls if call.path.startswith(names.REPORTS)]
    deleted = [call.index for call in store.calls if call.operation == "delete" and call.index in touching]
    assert len(deleted) == 2
    return touching[0], deleted[-1] + 1
