"""A disk that is full of what dead attempts have left: room is made at once, and the save goes through."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.coordinator.machine.actions import CollectGarbage
from distckpt.coordinator.shell.housekeeping import collect_garbage
from distckpt.directory.garbage import Watch
from distckpt.directory.log import read_tail
from distckpt.errors import StorageFullError, StoreUnsuitableError
from distckpt.format import names
from distckpt.format.json.log import Entry
from distckpt.storage import LocalStore
from distckpt.testing.faulty import Call, Fault, FaultyStore
from tests.support.checkpoints import new_attempt
from tests.support.gang import Gang
from tests.support.mounts import small_disk
from tests.support.small_runs import Trainer, assert_loads, files, mount, mounting, numbers, run

KIB = 1 << 10


@pytest.fixture(autouse=True)
def _mounting() -> Iterator[None]:
    with mounting():
        yield


def newest(directory: Path) -> Entry:
    entry = read_tail(LocalStore(directory)).entry
    assert entry is not None
    return entry


def dead_attempt(directory: Path, entry: Entry, nbytes: int = 10, made: int = 0xFFFF) -> Path:
    """A shard of an attempt that the coordinator of ``entry`` had begun when it died, just now; or ``made`` before."""
    attempt = f"e{entry.epoch}-{made:08x}{names.claim_of(entry.commit_id)}"
    shard = directory / "ckpt-7" / attempt / names.shard_name(0, 0)
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(nbytes))
    return shard


def test_what_a_dead_run_has_just_left_makes_room_for_the_save_that_needs_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "2m") as disk:
        run(disk, 1)
        dead = dead_attempt(disk, newest(disk), 1500 * KIB)
        checkpoint = distckpt.Checkpoint(weights=torch.ones(200 * KIB))
        with distckpt.CheckpointManager(checkpoint, disk) as manager:
            pending = manager.save(2)
            assert pending is not None
            assert pending.result(60) == f"{disk}/ckpt-2"
        assert not dead.exists()
        assert distckpt.load(disk / "ckpt-2")["weights"].sum() == 200 * KIB
        assert_loads(disk / "ckpt-1", 1)


def test_room_is_made_for_every_rank(gang2: Gang, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "8m") as disk:
        run(disk, 1)
        dead = dead_attempt(disk, newest(disk))
        paths = gang2.run("ranks.saves:save_where_it_is_full", directory=str(disk), filler=str(dead))
        assert paths == [f"{disk}/ckpt-3"] * 2
        assert not dead.exists()
        with distckpt.open(disk / "ckpt-3") as reader:
            assert reader.verify().damages == ()


def test_a_job_that_starts_on_a_full_disk_first_deletes_what_dead_ones_have_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "2m") as disk:
        run(disk, 1)
        dead = dead_attempt(disk, newest(disk), 900 * KIB)
        os.utime(dead, (0, 0))
        run(disk, 2)  # the next epoch, and not yet old enough for what it collects
        if not dead.exists():
            dead.parent.mkdir(parents=True)
            dead.write_bytes(bytes(900 * KIB))
        os.utime(dead, (0, 0))
        fill(disk / "filler")
        with distckpt.CheckpointManager(distckpt.Checkpoint(weights=torch.ones(100 * KIB)), disk) as manager:
            pending = manager.save(3)
            assert pending is not None
            assert pending.result(60) == f"{disk}/ckpt-3"
        assert not dead.exists()
        assert_loads(disk / "ckpt-2", 2)


def test_a_job_that_starts_on_a_disk_full_of_other_things_is_told_what_to_do_and_leaves_it_alone(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "small", "1m") as disk:
        run(disk, 1)
        fill(disk / "filler")
        before = files(disk)
        with pytest.raises(StoreUnsuitableError, match=r"No space left on device. Make room: `distckpt gc`"):
            distckpt.CheckpointManager(distckpt.Checkpoint(weights=torch.ones(1)), disk)
        assert files(disk) == before
        assert_loads(disk / "ckpt-1", 1)
        (disk / "filler").unlink()
        run(disk, 2)


def fill(file: Path) -> None:
    """Take all the room that there is, to the last byte."""
    with file.open("wb", buffering=0) as filling, contextlib.suppress(OSError):
        while True:
            filling.write(bytes(KIB))


def test_a_disk_that_stays_full_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m") as disk:
        checkpoint = distckpt.Checkpoint(weights=torch.ones(400 * KIB))
        manager = distckpt.CheckpointManager(checkpoint, disk)
        pending = manager.save(1)
        assert pending is not None
        assert isinstance(pending.exception(60), StorageFullError)
        manager.close()


@dataclass
class FullOnce:
    """The disk is full for the first write to a path that ends so."""

    end: str
    struck: bool = False

    def fault(self, call: Call) -> Fault | None:
        """The fault, once."""
        if self.struck or not call.operation.startswith("put") or not call.path.endswith(self.end):
            return None
        self.struck = True
        return Fault.FULL


@pytest.mark.parametrize("end", ["00000-0.arrow", names.INDEX, names.MANIFEST, names.entry_path(6)])
def test_whatever_finds_no_room_is_written_once_more_when_there_is(tmp_path: Path, end: str) -> None:
    run(tmp_path, 1)
    dead = dead_attempt(tmp_path, newest(tmp_path))
    assert newest(tmp_path).seq == 3
    script = FullOnce(end)
    with Trainer(mount(FaultyStore(LocalStore(tmp_path), script))) as trainer:
        trainer.saved(2)  # the sixth entry is its commit
        trainer.saved(3)
    assert script.struck
    assert not dead.exists()
    assert numbers(tmp_path) == [1, 2, 3]


# ---- what is garbage at once, and what is not -----------------------------------------------------------------------------


def collect(directory: Path, *, epoch: int, failed: frozenset[str] = frozenset(), urgent: bool = True) -> None:
    store, known = LocalStore(directory), newest(directory).state.known()
    action = CollectGarbage("ckpt", known, frozenset(), epoch, failed, urgent)
    collect_garbage(store, action, 3600.0, Watch(store))


def test_only_when_it_is_urgent_garbage_need_not_be_watched(tmp_path: Path) -> None:
    run(tmp_path, 1)
    dead = dead_attempt(tmp_path, newest(tmp_path), made=0)
    collect(tmp_path, epoch=2, urgent=False)
    assert dead.exists()
    collect(tmp_path, epoch=2)
    assert not dead.exists()
    assert_loads(tmp_path / "ckpt-1", 1)


def test_what_failed_in_this_epoch_is_garbage_at_once_and_nothing_else_of_it_is(tmp_path: Path) -> None:
    run(tmp_path, 1)
    entry = newest(tmp_path)
    dead = dead_attempt(tmp_path, entry)
    collect(tmp_path, epoch=entry.epoch)
    assert dead.exists()
    collect(tmp_path, epoch=entry.epoch, failed=frozenset({dead.parent.name}))
    assert not dead.exists()


def test_a_copy_in_the_making_is_left_alone_however_urgent_it_is(tmp_path: Path) -> None:
    """Somebody copies a checkpoint here, and its manifest has not come yet: it looks like a dead attempt."""
    run(tmp_path, 1)
    copied = LocalStore(tmp_path)
    attempt = new_attempt()
    copied.put_if_absent(f"ckpt-5/{attempt}/00000-0.arrow", b"part of it")
    collect(tmp_path, epoch=2)
    assert copied.stat(f"ckpt-5/{attempt}/00000-0.arrow") is not None


def test_a_coordinator_that_was_replaced_deletes_nothing(tmp_path: Path) -> None:
    run(tmp_path, 1)
    first = newest(tmp_path)
    replaced = first.epoch + 1
    run(tmp_path, 2)
    run(tmp_path, 3)
    dead = dead_attempt(tmp_path, first)
    assert newest(tmp_path).epoch > replaced
    collect(tmp_path, epoch=replaced)
    assert dead.exists()


def test_a_writer_whose_file_was_collected_has_its_save_fail(tmp_path: Path) -> None:
    """Nothing is sealed unless every shard is seen on the store."""

    class Swept(LocalStore):
        def put_unique(self, path: str, size: int, sections):  # type: ignore[no-untyped-def]
            info = super().put_unique(path, size, sections)
            if path.startswith("ckpt-2/"):
                (tmp_path / path).unlink()
            return info

    with Trainer(mount(Swept(tmp_path))) as trainer:
        trainer.saved(1)
        with pytest.raises(distckpt.errors.NotSharedError):
            trainer.saved(2)
        trainer.saved(3)
    assert numbers(tmp_path) == [1, 3]
