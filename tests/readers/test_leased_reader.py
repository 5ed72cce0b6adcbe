"""A reader that holds a lease keeps what it reads, whatever the clocks say, and knows when it no longer does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.directory.lease import LEASE_SECONDS, HeldLease
from distckpt.directory.leases import Leases
from distckpt.directory.locate import locate
from distckpt.errors import CheckpointNotFoundError, DamagedError, LeaseLostError
from distckpt.format import names
from distckpt.reader import CheckpointReader
from distckpt.storage import LocalStore
from tests.support.checkpoints import write_checkpoint
from tests.support.clock import Clock
from tests.support.damage import copied
from tests.support.small_runs import Trainer, attempt_folder, files, on_disk, run, until

READER = """
import sys, time
now = time.time
time.time = lambda: now() - float(sys.argv[2])
import distckpt
with distckpt.open(sys.argv[1], lease=True) as reader:
    print("open", flush=True)
    sys.stdin.readline()
    print(sorted(reader.load()), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[CheckpointReader, Clock]]:
    """A reader, and the clock by which its lease is held."""
    where, clock = locate(write_checkpoint(tmp_path, 1, {"a": torch.ones(3), "step": 1})), Clock()
    lease = HeldLease.take(where.store, where.manifest.attempt, "a test", clock=clock)
    with CheckpointReader(where, lease.check, lease.release) as reader:
        yield reader, clock


def test_what_is_open_under_a_lease_is_deleted_after_it_is_closed_and_not_before(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with Trainer(tmp_path, max_to_keep=1) as trainer, distckpt.open(f"{tmp_path}/ckpt-1", lease=True) as reader:
        trainer.saved(2)
        trainer.saved(3)
        assert until(lambda: on_disk(tmp_path) == [1, 3])
        assert reader.verify().good
        reader.close()
        trainer.saved(4)
        assert until(lambda: on_disk(tmp_path) == [4])


def test_a_process_whose_wall_clock_is_a_day_behind_keeps_what_it_reads_until_it_is_killed(tmp_path: Path) -> None:
    run(tmp_path, 1)
    command = [sys.executable, "-c", READER, str(tmp_path), "86400"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with Trainer(tmp_path, max_to_keep=1) as trainer:
            trainer.saved(2)
            trainer.saved(3)
        assert on_disk(tmp_path) == [1, 3]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "['save_counter', 'state']\n"
        process.kill()
    clock = Clock()
    leases = Leases(LocalStore(tmp_path), clock)
    assert len(leases.read().attempts) == 1
    clock.now += LEASE_SECONDS
    assert leases.read().attempts == frozenset()


def test_a_reader_that_has_lost_its_lease_reads_nothing_more(held: tuple[CheckpointReader, Clock]) -> None:
    reader, clock = held
    assert reader.load()["a"].tolist() == [1, 1, 1]
    clock.now += LEASE_SECONDS
    for read in (reader.load, reader.verify, lambda: reader.tensor("a"), lambda: reader.value("step")):
        with pytest.raises(LeaseLostError, match="could not be renewed for 120 s"):
            read()


def test_what_vanishes_while_the_lease_runs_out_is_not_taken_for_damage(held: tuple[CheckpointReader, Clock]) -> None:
    reader, clock = held
    for shard in attempt_folder(Path(reader.path).parent, 1).glob("*.arrow"):
        shard.unlink()
    with pytest.raises(DamagedError):
        reader.load()
    clock.step = LEASE_SECONDS / 2  # at each look, so that it ends meanwhile
    with pytest.raises(LeaseLostError):
        reader.load()


def test_a_lone_copy_is_opened_without_a_lease_as_nobody_retires_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", 1, {"a": torch.ones(3)})
    lone = copied(tmp_path / "run/ckpt-1", tmp_path / "alone")
    before = files(lone)
    with distckpt.open(lone, lease=True) as reader:
        assert reader.load()["a"].tolist() == [1, 1, 1]
        assert files(lone) == before


def test_what_has_been_retired_cannot_be_opened_under_a_lease(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(2)
    with pytest.raises(CheckpointNotFoundError):
        distckpt.open(f"{tmp_path}/ckpt-1", lease=True)
    assert not (tmp_path / names.LEASES).exists()
