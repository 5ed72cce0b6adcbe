"""Links, pipes, sockets and folders where files of a run should be: told at once, with what to do, and passed over."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distckpt
from distckpt.coordinator.shell.sealing import read_log_tail
from distckpt.directory.log import sequence_numbers
from distckpt.errors import BlockedError, CommitUnknownError, DamagedError
from distckpt.format import names
from distckpt.storage import LocalStore
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    assert_sound_log,
    attempt_folder,
    entries,
    numbers,
    run,
    settled,
)


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


THINGS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link": _dangling,
    "socket": _socket,
}


def remove(path: Path) -> None:
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def next_entry(directory: Path) -> Path:
    return directory / names.entry_path(max(sequence_numbers(LocalStore(directory))) + 1)


# ---- in the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_at_the_next_number_of_the_log_is_told_when_a_manager_is_made(tmp_path: Path, thing: str) -> None:
    directory = tmp_path / "r"
    run(directory, 1)
    blocked = next_entry(directory)
    THINGS[thing](blocked)
    with pytest.raises(BlockedError, match=rf"{blocked}: a .*{thing} is there.*[Mm]ove it away"):
        Trainer(directory)
    assert distckpt.latest_checkpoint(directory) == f"{directory}/ckpt-1"
    remove(blocked)
    run(directory, 2)
    assert numbers(directory) == [1, 2]
    assert_sound_log(directory)


@pytest.mark.parametrize("thing", ["pipe", "file"])
def test_what_is_in_the_place_of_the_log_is_told_when_a_manager_is_made(tmp_path: Path, thing: str) -> None:
    log = tmp_path / names.LOG
    os.mkfifo(log) if thing == "pipe" else log.write_text("mine")
    with pytest.raises(BlockedError, match=rf"{log}/.*a file is where a folder should be. Move it away"):
        Trainer(tmp_path)


def test_what_comes_in_the_way_of_a_run_is_told_by_its_save_which_is_committed_once_it_is_gone(tmp_path: Path) -> None:
    directory = tmp_path / "r"
    with Trainer(directory) as trainer:
        trainer.saved(1)
        settled(directory)
        blocked = next_entry(directory)
        os.mkfifo(blocked)
        with pytest.raises(CommitUnknownError, match=rf"{blocked}: a pipe is there"):
            trainer.saved(2)
        remove(blocked)
        trainer.saved(3)
    assert numbers(directory) == [1, 2, 3]
    assert_sound_log(directory)


# ---- in an attempt ------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncommitted(tmp_path: Path) -> Path:
    """ckpt-2 of a run lacks nothing but its entry."""
    directory = tmp_path / "r"
    run(directory, 1, 2)
    for entry in reversed(entries(directory)):
        if 2 not in [record.number for record in entry.state.active]:
            break
        (directory / names.entry_path(entry.seq)).unlink()
    assert numbers(directory) == [1]
    assert [record.number for record in read_log_tail(LocalStore(directory)).complete] == [2]
    return directory


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", [names.MANIFEST, names.INDEX, "00000-0.arrow"])
def test_what_is_in_the_way_of_an_attempt_does_not_stop_the_next_run(uncommitted: Path, thing: str, name: str) -> None:
    [attempt] = (uncommitted / "ckpt-2").iterdir()
    (attempt / name).unlink()
    THINGS[thing](attempt / name)
    with Trainer(uncommitted) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{uncommitted}/ckpt-1"
        trainer.saved(3)
    assert numbers(uncommitted) == [1, 3]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", [names.MANIFEST, names.INDEX, "00000-0.arrow"])
def test_what_is_in_the_place_of_a_checkpoints_file_is_damage(tmp_path: Path, thing: str, name: str) -> None:
    directory = tmp_path / "r"
    run(directory, 1, 2)
    file = attempt_folder(directory, 2) / name
    file.unlink()
    THINGS[thing](file)
    with pytest.raises(DamagedError, match=name):
        distckpt.load(directory / "ckpt-2")
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-1"
        trainer.saved(3)
    assert_loads(directory / "ckpt-3", 3)


def test_a_link_in_the_place_of_a_checkpoints_folder_is_damage(tmp_path: Path) -> None:
    directory = tmp_path / "r"
    run(directory, 1, 2)
    shutil.rmtree(directory / "ckpt-2")
    _dangling(directory / "ckpt-2")
    with Trainer(directory) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{directory}/ckpt-1"
        trainer.saved(3)
    assert_loads(directory / "ckpt-3", 3)
