"""What evaluations report belongs to exactly the attempt that was read, and is told by everything that reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import distckpt
from distckpt.cli import main
from distckpt.directory.reports import read_reports, reported_metrics, write_report
from distckpt.errors import StoreOutcomeUnknownError
from distckpt.format import names
from distckpt.format.json.log import MAX_ID_LENGTH, CheckpointRecord
from distckpt.format.json.report import MAX_METRICS, Report
from distckpt.format.json.sealed import seal
from distckpt.storage import MemoryStore
from tests.support.checkpoints import commit, commit_bare, new_attempt, put_manifest, write_checkpoint
from tests.support.small_runs import Trainer


def committed(store: MemoryStore, number: int = 1) -> CheckpointRecord:
    record = put_manifest(store, number, new_attempt())
    commit(store, record)
    return record


def told(*arguments: str | Path) -> Any:
    return json.loads(CliRunner().invoke(main, [*map(str, arguments), "--json"]).stdout)


def test_what_is_reported_is_told_by_readers_and_commands_before_any_entry_has_it(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2, {"step": 2}) or tmp_path / "ckpt-2"
    with distckpt.open(tmp_path) as reader:
        assert reader.metrics == {}
        reader.report({"loss": 1.25, "top-1 (val)": 71})
        reader.report({"loss": 1.5}, "a second worker")
        assert reader.metrics == {"loss": 1.5, "top-1 (val)": 71.0}
    first, second = told("ls", tmp_path)["checkpoints"]
    assert (first["metrics"], second["metrics"]) == ({}, {"loss": 1.5, "top-1 (val)": 71.0})
    assert told("show", path)["metrics"] == {"loss": 1.5, "top-1 (val)": 71.0}
    assert "loss=1.5, top-1 (val)=71" in CliRunner().invoke(main, ["show", str(path)]).stdout


def test_a_report_is_of_the_attempt_that_was_read_and_not_of_one_that_took_its_number() -> None:
    store = MemoryStore()
    old, new = committed(store, 7), committed(store, 7)
    write_report(store, old.attempt, {"loss": 1})
    assert reported_metrics(store, old.attempt) == {"loss": 1.0}
    assert reported_metrics(store, new.attempt) == {}


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"loss": float("nan")}, "'loss' is nan"),
        ({"loss": float("inf")}, "only finite"),
        ({}, "0 metrics"),
        ({"": 1.0}, "not the name of a metric"),
        ({"a\nb": 1.0}, "not the name of a metric"),
        ({"x" * 129: 1.0}, "not the name of a metric"),
        ({f"m{index}": 1.0 for index in range(MAX_METRICS + 1)}, "65 metrics"),
        ({"\ud800": 1.0}, "not the name of a metric"),
        ({"loss": 10**400}, "metric 'loss' is inf"),
        ({"loss": torch.tensor([1.0, 2.0])}, "metric 'loss' must be one number, not tensor"),
        ({"loss": np.array([1.0, 2.0])}, "metric 'loss' must be one number, not array"),
        ({"loss": torch.empty((), device="meta")}, "metric 'loss' must be one number"),
        ({"eval": {"loss": 1.0}}, "metric 'eval' must be one number, not {'loss': 1.0}"),
        ({"loss": "low"}, "metric 'loss' must be one number, not 'low'"),
        ({1: 1.0}, "a metric's name is a str, and this is 1"),
        (None, "reported as a dict"),
        ([("loss", 1.0)], "reported as a dict"),
    ],
)
def test_what_no_reader_would_take_is_refused_and_leaves_nothing(metrics: Any, words: str) -> None:
    store = MemoryStore()
    with pytest.raises((TypeError, ValueError), match=words):
        write_report(store, new_attempt(), metrics)
    assert list(store.list(names.REPORTS)) == []


def test_what_would_be_one_metric_too_many_is_refused_by_name(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.manager.save(1, metrics={f"m{at}": 1.0 for at in range(40)}).result(60)
    with distckpt.open(tmp_path) as reader:
        reader.report({f"m{at}": 2.0 for at in range(40, 63)})
        reader.report({"m0": 3.0, "loss": 0.5})
        with pytest.raises(ValueError, match="has 64 metrics, and 64 is the most: other cannot be added"):
            reader.report({"m1": 4.0, "other": 0.1})
        reader.report({"loss": 0.25})
        assert (len(reader.metrics), reader.metrics["loss"], reader.metrics["m1"]) == (64, 0.25, 1.0)


def test_scalars_of_other_libraries_are_numbers() -> None:
    store, attempt = MemoryStore(), new_attempt()
    write_report(store, attempt, {"a": torch.tensor([1.5]), "b": np.float32(2.5), "c": np.array(3.5), "d": True})
    assert [one.report.metrics for one in read_reports(store).found] == [{"a": 1.5, "b": 2.5, "c": 3.5, "d": 1.0}]


def test_a_report_whose_answer_was_lost_is_there_once() -> None:
    class Lossy(MemoryStore):
        """Writes, and says that it does not know; then, as it should, that the name is taken."""

        answers = 0

        def put_if_absent(self, path: str, data: bytes) -> None:
            self.answers += 1
            super().put_if_absent(path, data)
            raise StoreOutcomeUnknownError(path, "no answer")

    store = Lossy()
    attempt = new_attempt()
    write_report(store, attempt, {"loss": 1.0})
    assert [one.report.metrics for one in read_reports(store).found] == [{"loss": 1.0}]
    assert store.answers == 2


def test_a_damaged_report_and_what_is_none_hide_no_other(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    attempt, other = new_attempt(), new_attempt()
    store.put_if_absent(names.report_path(attempt, "0" * 32), b"damaged")
    store.put_if_absent(names.report_path(attempt, "1" * 32), seal(Report(1, other, {"loss": 9.0}, 1.0)))
    store.put_if_absent(f"{names.REPORTS}/notes.txt", b"mine")
    write_report(store, attempt, {"loss": 1.0}, "x" * MAX_ID_LENGTH)
    seen = set[str]()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [one.report.metrics for one in read_reports(store, told=seen).found] == [{"loss": 1.0}]
    assert len(caplog.records) == 2
