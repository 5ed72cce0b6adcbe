"""What memory keeps of large files: the newest checkpoint, where there is room, so that a restart reads at its speed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.storage import LocalStore, SupportsCooling
from distckpt.storage.room import SHARE, available, has_room
from distckpt.testing.observing import MIB, aligned, pattern, sections_of, share_in_memory
from tests.support.small_runs import attempt_folder


@pytest.fixture(autouse=True)
def _a_disk(tmp_path: Path) -> None:
    """Where files are memory, memory keeps them in any case."""
    LocalStore(tmp_path, direct_io=True).put_unique("probe", MIB, [aligned(bytes(MIB))])
    if share_in_memory(tmp_path / "probe"):
        pytest.skip("this file system keeps files in memory, or has no O_DIRECT")


def test_a_large_file_stays_in_memory_if_there_is_room_for_it(tmp_path: Path) -> None:
    data = pattern(20 * MIB + 5000)
    for direct_io, share in ((None, 1.0), (False, 1.0), (True, 0.0)):
        store = LocalStore(tmp_path, direct_io=direct_io)
        store.put_unique(f"{direct_io}", len(data), sections_of(aligned(data), 4 * MIB))
        assert share_in_memory(tmp_path / f"{direct_io}") == pytest.approx(share, abs=0.01)
        assert (tmp_path / f"{direct_io}").read_bytes() == data


def test_the_budget_is_a_part_of_the_memory_that_is_available_for_all_ranks_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert available() > 0
    assert has_room(MIB)
    assert not has_room(available())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(available() // SHARE // MIB * 2))
    assert not has_room(MIB)


def test_what_has_cooled_is_not_in_memory_and_what_is_missing_cools_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, direct_io=False)
    assert isinstance(store, SupportsCooling)
    store.put_unique("a/large", MIB, [aligned(bytes(MIB))])
    store.cool("a/large")
    assert share_in_memory(tmp_path / "a/large") == 0
    store.cool("a/missing")


def test_memory_keeps_the_newest_checkpoint_alone(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(weights=torch.ones(1 << 20))
    with distckpt.CheckpointManager(checkpoint, tmp_path) as manager:
        for number in (1, 2, 3):
            manager.save(number)
    shares = {number: share_in_memory(attempt_folder(tmp_path, number) / "00000-0.arrow") for number in (1, 2, 3)}
    assert shares[1] == shares[2] == 0
    assert shares[3] == 1


def test_verifying_reads_what_is_stored_and_not_what_memory_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where a save verifies what it has just written, and later."""
    cooled: list[str] = []
    advise = os.posix_fadvise

    def seen(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        cooled.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        advise(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", seen)
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(9)), tmp_path, verify=True) as manager:
        path = manager.save(1)
    assert cooled == ["00000-0.arrow"]
    assert path is not None
    with distckpt.open(path) as reader:
        assert reader.verify().good
    assert cooled == ["00000-0.arrow"] * 2
