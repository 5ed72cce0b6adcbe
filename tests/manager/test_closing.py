"""Closing a manager whose store hangs: it returns, says what it leaves undone, and the program ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.errors import CommitUnknownError
from tests.support.gang import ROOT
from tests.support.hanging import hanging
from tests.support.small_runs import Trainer, assert_loads, mounting, numbers, until


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("distckpt.manager.CLOSE_SECONDS", 0.3)
    monkeypatch.setattr("distckpt.coordinator.shell.shell.CLOSE_SECONDS", 0.3)
    with mounting():
        yield


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("put_unique", "ckpt-2"),
        ("stat", "ckpt-2"),
        ("put_if_absent", "ckpt-2"),
        ("put_if_absent", "_log"),
        ("list", "_log"),
    ],
)
def test_a_save_that_hangs_is_given_up_and_said(tmp_path: Path, operation: str, path: str) -> None:
    hang, url = hanging(tmp_path, operation, path)
    trainer = Trainer(url, save_timeout=0.3)
    trainer.saved(1)
    hang.armed = True
    pending = trainer.save(2)
    assert hang.hanging.wait(20)
    with pytest.raises(CommitUnknownError, match=r"checkpoint 2 .* not decided after 0\.9 s"):
        trainer.manager.close()
    assert_loads(tmp_path / "ckpt-1", 1)
    hang.go.set()
    assert until(pending.done)
    with Trainer(tmp_path) as trainer:
        assert trainer.manager.restore_or_initialize() in (f"{tmp_path}/ckpt-1", f"{tmp_path}/ckpt-2")
        trainer.saved(3)
    assert numbers(tmp_path)[-1] == 3


def test_retention_that_hangs_is_left_to_the_next_manager(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hang, url = hanging(tmp_path, "delete", "ckpt-1")
    with Trainer(url, max_to_keep=1) as trainer:
        trainer.saved(1)
        hang.armed = True
        trainer.saved(2)
        assert hang.hanging.wait(20)
    assert "closing has waited 0.3 s for the store" in caplog.text
    assert "Left undone, until the next manager: Delete" in caplog.text
    hang.go.set()
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(3)
    assert numbers(tmp_path) == [3]


def test_closing_a_store_that_answers_leaves_no_thread(tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with Trainer(tmp_path, buffers=2) as trainer:
        trainer.saved(1)
    assert {thread.name for thread in threading.enumerate()} <= before


@pytest.mark.wide(2)
@pytest.mark.parametrize(("operation", "path"), [("put_unique", "ckpt-2"), ("put_if_absent", "_log")])
def test_a_program_ends_although_its_store_hangs(tmp_path: Path, operation: str, path: str) -> None:
    script = str(ROOT / "tests" / "ranks" / "programs" / "hangs.py")
    command = [sys.executable, script, str(tmp_path), operation, path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint 2 was not saved: it is not decided after" in done.stderr
    assert_loads(tmp_path / "ckpt-1", 1)
