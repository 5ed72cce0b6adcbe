"""Directories that somebody has stuffed with names, or with folders in folders in folders."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli import main
from distckpt.coordinator.machine.actions import CollectGarbage
from distckpt.coordinator.shell.housekeeping import collect_garbage
from distckpt.directory.garbage import Watch
from distckpt.directory.leases import Leases
from distckpt.errors import DistckptError
from distckpt.format import names
from distckpt.storage import LocalStore, ObjectInfo
from tests.support.checkpoints import new_attempt
from tests.support.clock import Clock
from tests.support.small_runs import Trainer, assert_loads, mount, mounting, numbers, run

LEVELS = 3000


@pytest.fixture
def nested() -> Iterator[Path]:
    """A run with a very deep folder wherever folders are listed, in memory, where making so many takes no time."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    run(directory, 1)
    attempt = next((directory / "ckpt-1").iterdir())
    for folder in (
        "",
        names.LOG,
        names.LEASES,
        names.STATS,
        "_probe",
        "ckpt-1",
        f"ckpt-1/{attempt.name}",
        f"ckpt-2/{new_attempt()}",
    ):
        dig(directory / folder)
    yield directory
    subprocess.run(["rm", "-rf", str(directory)], check=True)  # Python's own ways give up at such a depth


def dig(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(LEVELS):
        os.mkdir("deep", dir_fd=fd)
        inner = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


def test_folders_in_folders_hold_nobody_up(nested: Path) -> None:
    assert distckpt.latest_checkpoint(nested) == f"{nested}/ckpt-1"
    assert_loads(nested / "ckpt-1", 1)
    for command in ("ls", "stats", "verify"):
        assert CliRunner().invoke(main, [command, str(nested)]).exit_code == 0
    with Trainer(nested, max_to_keep=1) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{nested}/ckpt-1"
        trainer.saved(2)
        trainer.saved(3)
    assert numbers(nested) == [3]


def test_garbage_is_collected_beside_folders_in_folders(nested: Path) -> None:
    store = LocalStore(nested)
    attempt = new_attempt()
    store.put_if_absent(f"ckpt-2/{attempt}/00000-0.arrow", b"left behind")
    old = nested / names.LOG / f".{'0' * 32}.tmp"
    old.write_bytes(b"half an entry")
    clock = Clock()
    watch = Watch(store, clock)
    for _ in range(2):
        assert old.exists()
        collect_garbage(store, CollectGarbage("ckpt", frozenset(), frozenset(), 1 << 40), 60.0, watch)
        clock.now += 60
    assert not old.exists()
    assert not (nested / "ckpt-2" / attempt).exists()


class Endless(LocalStore):
    """Has names without an end in one folder."""

    def __init__(self, root: Path, folder: str) -> None:
        super().__init__(root)
        self.endless = folder

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        if folder != self.endless:
            return super().list(folder)
        return (ObjectInfo(f"{folder}/{number}", 1, time.time()) for number in itertools.count())


READERS: dict[str, Callable[[str], Any]] = {
    "latest_checkpoint": distckpt.latest_checkpoint,
    "checkpoints_iterator": lambda url: next(distckpt.checkpoints_iterator(url, timeout=0)),
    "load": distckpt.load,
    "manager": Trainer,
}


@pytest.mark.parametrize("read", READERS)
def test_a_log_without_an_end_is_refused_by_name(tmp_path: Path, read: str) -> None:
    run(tmp_path, 1)
    with mounting(), pytest.raises(DistckptError, match=r"/_log: holds more than 65536 names.*move away"):
        READERS[read](mount(Endless(tmp_path, names.LOG)))


def test_leases_without_an_end_are_refused_by_name(tmp_path: Path) -> None:
    read = Leases(Endless(tmp_path, names.LEASES)).read()
    assert "more than" in read.failed
    assert str(tmp_path / names.LEASES) in read.failed


def test_a_folder_is_read_on_only_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for number in range(20):
        store.put_if_absent(f"log/{number}", b"x")
    listing = store.list("log")
    first = next(listing).path
    for number in range(20):
        store.delete(f"log/{number}")
    assert first.startswith("log/")
    assert list(listing) == []
