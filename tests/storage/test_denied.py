"""Who lacks a right is told that, and not that something is damaged, or may have happened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli.app import main
from distckpt.errors import AccessDeniedError, StoreUnsuitableError
from distckpt.storage import open_store

NOBODY = 65534


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A directory with a checkpoint, all of which belongs to root, seen as another user sees it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    directory = tmp_path / "run"
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(step=7), directory
    ) as manager:  # and all is imported that is needed
        manager.save(1).result(30)
    distckpt.watch(directory, timeout=0).close()
    assert CliRunner().invoke(main, ["verify", str(directory)]).exit_code == 0
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    os.seteuid(NOBODY)
    yield directory
    os.seteuid(0)


def test_who_may_not_write_is_told_who_it_is_and_what_reads_all_the_same(run: Path) -> None:
    assert distckpt.load(run)["step"] == 7
    store = open_store(run)
    for change in (
        lambda: store.put_if_absent("_probe/x", b"x"),
        lambda: store.replace("checkpoint", b"x"),
        lambda: store.delete(f"_log/{1:020d}.json"),
    ):
        with pytest.raises(AccessDeniedError, match=f"Permission denied to user {NOBODY}. Who saves must be allowed"):
            change()
    with pytest.raises(StoreUnsuitableError, match=f"denied to user {NOBODY}.*Checkpoint.restore and distckpt.load"):
        distckpt.CheckpointManager(distckpt.Checkpoint(step=0), run)
    with pytest.raises(AccessDeniedError, match="could not be written: Permission denied"):
        distckpt.watch(run, group="eval", timeout=0)


def test_what_may_not_be_read_is_not_called_damaged(run: Path) -> None:
    os.seteuid(0)
    [shard] = run.glob("ckpt-1/*/00000-0.arrow")
    shard.chmod(0o600)
    os.seteuid(NOBODY)
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 2, result.output
    assert "DAMAGED" not in result.output
    assert f"Permission denied to user {NOBODY}" in result.output
    os.seteuid(0)
    assert CliRunner().invoke(main, ["verify", str(run)]).exit_code == 0
