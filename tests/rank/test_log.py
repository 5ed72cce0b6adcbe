"""What the log says of a run in which nothing goes wrong, and of one that is slow."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import distckpt
from distckpt.cli import main
from distckpt.directory.stats import read_stats
from distckpt.storage import LocalStore
from tests.support.gang import Gang


def test_a_good_run_says_what_it_has_done_and_nothing_that_sounds_like_a_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distckpt")
    run = str(tmp_path / "run")
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(1000)), run, max_to_keep=1) as manager:
        manager.restore_or_initialize()
        for number in (1, 2):
            manager.save(number)
            manager.wait()
        manager.restore()
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("distckpt")]
    seconds = r"\d+\.\d\d\d? s"
    saved = rf"KiB of 1 rank; training stood still for {seconds}; written after {seconds} and committed after {seconds}"
    wanted = [
        rf"{run} opened for run 1, of 1 rank",
        rf"{run}/ckpt-1 saved: [\d.]+ {saved}",
        rf"{run}/ckpt-2 saved: [\d.]+ {saved}",
        rf"{run}/ckpt-1 retired, to make room",
        rf"{run}/ckpt-2 restored in {seconds}: [\d.]+ KiB read by rank 0",
    ]
    assert len(texts) == len(wanted), texts
    for text, pattern in zip(texts, wanted, strict=True):
        assert re.fullmatch(pattern, text), text
    assert {record.levelname for record in caplog.records if record.name.startswith("distckpt")} == {"INFO"}


def test_a_number_that_is_saved_again_is_not_said_to_be_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distckpt")
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(10)), tmp_path) as manager:
        for number in (1, 2):
            manager.save(number)
            manager.wait()
        manager.restore(1)
        manager.save(2)
        manager.wait()
    retired = [text for text in (record.getMessage() for record in caplog.records) if "retired" in text]
    assert retired == [f"the former {tmp_path}/ckpt-2 retired"]


def test_a_plain_request_to_stop_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distckpt")
    coordinator = distckpt.Coordinator()
    coordinator.request_stop()
    coordinator.join([])
    assert caplog.records == []


@pytest.mark.timeout(120)
def test_a_rank_that_is_late_is_named_long_before_the_deadline_and_rank_0_says_who_was_last(
    gang2: Gang, tmp_path: Path
) -> None:
    texts, others = gang2.run("ranks.late:save_late", directory=str(tmp_path), late=1)
    assert others == []
    late = [text for text in texts if text.startswith("WARNING")]
    assert len(late) == 1
    assert re.fullmatch(
        r"WARNING waiting for rank 1 \(.+\) to (join the save|report that its shards have landed), "
        r"for [\d.]+ s by now; after 20 s the save fails",
        late[0],
    )
    assert any(re.search(r"ckpt-1 saved: .* of 2 ranks; .*; last was rank 1 \(.+\), ", text) for text in texts)
    (run,) = read_stats(LocalStore(tmp_path / "run")).history.runs
    (save,) = run.recent
    assert (save.number, save.last) == (1, 1)
    assert 0 < save.stall <= save.committed
    assert 0 < save.lag <= save.committed
    shown = CliRunner().invoke(main, ["stats", str(tmp_path / "run")]).output
    assert re.search(r"rank 1 +1 of 1 +", shown)
