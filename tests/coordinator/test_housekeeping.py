"""What clean-up deletes: all that can never be a checkpoint, and nothing that has been one."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

import distckpt
from distckpt.coordinator.machine.actions import CollectGarbage
from distckpt.coordinator.shell.housekeeping import collect_garbage, delete_checkpoints
from distckpt.directory import log
from distckpt.directory.garbage import Watch
from distckpt.directory.log import append, read_tail
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, Entry, Kind, State
from distckpt.storage import LocalStore, Store
from distckpt.testing.faults import Fault, FaultOn
from distckpt.testing.faulty import FaultyStore
from tests.support.checkpoints import put_manifest
from tests.support.clock import Clock
from tests.support.small_runs import Trainer, mount, mounting, numbers, on_disk, run, until

HOUR = 3600.0


def attempt_of(epoch: int, made: int, claim: str) -> str:
    return f"e{epoch}-{made:08x}{claim * 24}"


def entry(store: Store, epoch: int, made: int, claim: str, kind: Kind, *active: CheckpointRecord) -> None:
    """One that a coordinator has written."""
    seq = read_tail(store).seq + 1
    written = Entry(1, seq, epoch, kind, time.time(), f"{made:08x}{claim * 24}", State(active=active, run=1))
    assert append(store, written).outcome == "appended"


def drop_entries(directory: Path, before: int) -> None:
    """As pruning does."""
    for seq in range(1, before):
        (directory / names.entry_path(seq)).unlink(missing_ok=True)


def collect(store: Store, epoch: int, watch: Watch | None = None, failed: frozenset[str] = frozenset()) -> int:
    known = read_tail(store).state.known()
    action = CollectGarbage("ckpt", known, frozenset(), epoch, failed)
    return collect_garbage(store, action, HOUR, watch or Watch(store))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Coordinator a has committed 1; b follows it in epoch 2."""
    store = LocalStore(tmp_path)
    entry(store, 1, 1, "a", "claim")
    first = put_manifest(store, 1, attempt_of(1, 2, "a"))
    entry(store, 1, 3, "a", "commit", first)
    entry(store, 2, 1, "b", "claim", first)
    return store


def test_what_a_predecessor_sealed_and_never_committed_goes_at_once(store: LocalStore, tmp_path: Path) -> None:
    put_manifest(store, 2, attempt_of(1, 4, "a"))
    assert collect(store, 2) == 1
    assert on_disk(tmp_path) == [1]


def put_shard(directory: Path, number: int, attempt: str) -> Path:
    path = directory / f"ckpt-{number}" / attempt / "00000-0.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a shard")
    return path


CLOCKS = ["none", "a day behind", "a day ahead"]


@pytest.mark.parametrize("modified", [0.0, time.time() - 86400, time.time() + 86400], ids=CLOCKS)
def test_what_a_predecessor_had_begun_last_goes_soon_with_its_hidden_files_whatever_the_clocks_say(
    store: LocalStore, tmp_path: Path, modified: float
) -> None:
    """So a job that is restarted every few minutes does not fill its disk."""
    shard = put_shard(tmp_path, 2, attempt_of(1, 4, "a"))
    for path in (shard, shard.with_name(f".{'7' * 32}.tmp")):
        path.write_bytes(b"half")
        os.utime(path, (modified, modified))
    clock = Clock()
    watch = Watch(store, clock)
    collect(store, 2, watch)
    assert on_disk(tmp_path) == [1, 2], "its ranks may not have heard yet that they were replaced"
    clock.now += 10
    collect(store, 2, watch)
    assert on_disk(tmp_path) == [1]


@pytest.mark.parametrize("modified", [0.0, time.time() - 86400, time.time() + 86400], ids=CLOCKS)
@pytest.mark.parametrize(
    ("attempt", "seconds"), [(attempt_of(1, 7, "f"), HOUR), (attempt_of(1, 1, "a"), 60), (attempt_of(2, 7, "b"), 60)]
)
def test_what_may_be_a_copy_in_the_making_or_be_written_to_goes_once_nobody_has_touched_it_for_long(
    store: LocalStore, tmp_path: Path, attempt: str, seconds: float, modified: float
) -> None:
    """From elsewhere, back from a backup, or of ranks whose save has failed; by our own clock, from when it was seen."""
    clock = Clock()
    watch, failed = Watch(store, clock), frozenset({attempt_of(2, 7, "b")})
    shard = put_shard(tmp_path, 2, attempt)
    os.utime(shard, (modified, modified))
    assert collect(store, 2, watch, failed) == 0
    clock.now += seconds - 1
    assert collect(store, 2, watch, failed) == 0
    shard.with_name(f".{'7' * 32}.tmp").write_bytes(b"another one is coming")
    clock.now += 1
    assert collect(store, 2, watch, failed) == 0
    clock.now += seconds - 1
    assert collect(store, 2, watch, failed) == 0
    clock.now += 1
    collect(store, 2, watch, failed)
    assert on_disk(tmp_path) == [1]


def test_what_killed_processes_have_hidden_beside_the_attempts_goes_once_it_was_seen_unchanged(
    store: LocalStore, tmp_path: Path
) -> None:
    clock, watch_clock = Clock(), Clock()
    watch = Watch(store, clock)
    lost = [tmp_path / folder / f".{'7' * 32}.tmp" for folder in ("", names.LOG, names.LEASES)]
    probe = tmp_path / "_probe" / "dead"
    for path in (*lost, probe):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    assert collect(store, 2, watch) == 0
    clock.now += 60
    assert collect(store, 2, Watch(store, watch_clock)) == 0, "another observer begins anew"
    lost[0].write_bytes(b"whole now")
    assert collect(store, 2, watch) == 2
    clock.now += HOUR
    assert collect(store, 2, watch) == 2
    assert not any(path.exists() for path in (*lost, probe))


def test_it_goes_also_when_it_was_sealed_after_the_log_had_dropped_its_coordinator(
    store: LocalStore, tmp_path: Path
) -> None:
    """One that was thought dead finishes what it did; the next commit of it is turned away."""
    watch = Watch(store)
    assert collect(store, 2, watch) == 0
    drop_entries(tmp_path, 3)
    put_manifest(store, 2, attempt_of(1, 4, "a"))
    assert collect(store, 2, watch) == 1
    assert on_disk(tmp_path) == [1]


def test_what_has_been_a_checkpoint_and_is_back_is_left_alone(
    store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A person has copied it from a backup, years old by its times, and not adopted it yet."""
    shutil.copytree(tmp_path / "ckpt-1", tmp_path / "backup")
    entry(store, 2, 2, "b", "commit", put_manifest(store, 3, attempt_of(2, 1, "b")))
    shutil.rmtree(tmp_path / "ckpt-1")
    shutil.move(tmp_path / "backup", tmp_path / "ckpt-1")
    for path in tmp_path.glob("ckpt-1/*/*"):
        os.utime(path, (0, 0))
    assert collect(store, 2) == 0
    assert on_disk(tmp_path) == [1, 3]
    assert "distckpt adopt" in caplog.text


def test_what_comes_from_elsewhere_is_left_alone_though_others_of_its_run_were_adopted(
    store: LocalStore, tmp_path: Path
) -> None:
    foreign = [put_manifest(store, number, attempt_of(1, number, "f")) for number in (7, 8)]
    entry(store, 2, 2, "b", "claim", foreign[0])
    assert collect(store, 3) == 0
    assert on_disk(tmp_path) == [1, 7, 8]


def test_whom_a_damaged_entry_named_is_not_known_so_all_are_spared(
    store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_manifest(store, 2, attempt_of(1, 4, "a"))
    (tmp_path / names.entry_path(2)).write_bytes(b"damaged")
    assert collect(store, 2) == 0
    assert on_disk(tmp_path) == [1, 2]
    assert "is not collected" in caplog.text


class Stubborn(LocalStore):
    """Deletes nothing of one checkpoint."""

    def delete(self, path: str) -> None:
        """See Store."""
        if path.startswith("ckpt-7/"):
            raise OSError("untranslated")
        super().delete(path)


def test_one_attempt_that_cannot_be_deleted_keeps_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Stubborn(tmp_path)
    entry(store, 1, 1, "a", "claim")
    entry(store, 2, 1, "b", "claim")
    records = tuple(put_manifest(store, number, attempt_of(1, number, "a")) for number in (6, 7, 8))
    assert collect(store, 2) == 2
    assert on_disk(tmp_path) == [7]
    assert "ckpt-7" in caplog.text
    again = tuple(put_manifest(store, number, attempt_of(1, number, "c")) for number in (6, 7, 8))
    done = delete_checkpoints(store, again)
    assert done.attempts == (again[0].attempt, again[2].attempt)
    assert records[1].attempt != again[1].attempt


def test_a_manager_collects_what_the_one_before_had_sealed_however_many_entries_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "KEEP_ENTRIES", 4)
    run(tmp_path, 1)
    tail = read_tail(LocalStore(tmp_path))
    [record] = tail.state.active
    epoch, claim = names.attempt_epoch(record.attempt), names.claim_of(record.attempt)
    store = FaultyStore(LocalStore(tmp_path), FaultOn("put_unique", Fault.BEFORE, "ckpt-99/"))
    with mounting(), Trainer(mount(store)) as trainer:
        for number in range(2, 8):
            trainer.saved(number)
        # The log is pruned after a save has been answered.
        assert until(lambda: not (tmp_path / names.entry_path(tail.seq)).exists())
        put_manifest(LocalStore(tmp_path), 9, f"e{epoch}-{99:08x}{claim}")  # the one before wakes up, and is too late
        assert trainer.save(99).exception(30)  # after which garbage is looked for
        assert until(lambda: 9 not in on_disk(tmp_path))
    assert numbers(tmp_path) == [3, 4, 5, 6, 7]
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-7"
