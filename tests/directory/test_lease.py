"""A lease keeps retention away from what is being read, for as long as it is renewed and no longer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.directory.lease import LEASE_SECONDS, hold
from distckpt.directory.leases import Leased, Leases
from distckpt.directory.log import read_tail
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.format import names
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, Store
from distckpt.testing.faults import Fault, FaultOn
from distckpt.testing.faulty import FaultyStore
from tests.support.checkpoints import append_state, commit, new_attempt, put_manifest
from tests.support.small_runs import Trainer, lease_on, mount, mounting, on_disk, run


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def committed(store: Store, number: int = 1) -> str:
    record = put_manifest(store, number, new_attempt())
    commit(store, record)
    return record.attempt


def leased(store: Store) -> frozenset[str]:
    return Leases(store).read().attempts


def test_what_is_held_is_not_deleted_and_goes_when_it_is_released(tmp_path: Path) -> None:
    state = {"a": torch.ones(3)}
    with distckpt.CheckpointManager(distckpt.Checkpoint(state=state), tmp_path, max_to_keep=1) as manager:
        first = manager.save(1).result(30)
        [record] = read_tail(LocalStore(tmp_path)).state.active
        with hold(LocalStore(tmp_path), record.attempt, "a test"):
            manager.save(2).result(30)
            manager.save(3).result(30)
            assert manager.checkpoints == [first, f"{tmp_path}/ckpt-3"]
            assert distckpt.load(first)["state"]["a"].tolist() == [1, 1, 1]
        assert leased(LocalStore(tmp_path)) == frozenset()
        manager.save(4).result(30)
    assert manager.checkpoints == [f"{tmp_path}/ckpt-4"]
    assert not (tmp_path / "ckpt-1").exists()


def test_a_preserved_checkpoint_can_be_held(store: MemoryStore) -> None:
    attempt = committed(store)
    append_state(store, lambda state: type(state)(preserved=state.active), "retire")
    with hold(store, attempt, "a test"):
        assert leased(store) == {attempt}


def test_what_is_retiring_cannot_be_held_any_more(store: MemoryStore) -> None:
    attempt = committed(store)
    append_state(store, lambda state: type(state)(retiring=state.active), "retire")
    with pytest.raises(CheckpointNotFoundError, match=attempt), hold(store, attempt, "a test"):
        pytest.fail("it was held")
    assert list(store.list(names.LEASES)) == []


def test_a_lease_is_renewed_for_as_long_as_it_is_held(store: MemoryStore) -> None:
    attempt = committed(store)
    with hold(store, attempt, "a test", seconds=0.4):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert leased(store) == {attempt}
            time.sleep(0.02)
    assert list(store.list(names.LEASES)) == []


def test_what_a_killed_reader_left_behind_expires(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = committed(store)
    now = time.time()
    with hold(store, attempt, "a test"):
        monkeypatch.setattr(time, "time", lambda: now + LEASE_SECONDS - 10)
        assert leased(store) == {attempt}
        monkeypatch.setattr(time, "time", lambda: now + LEASE_SECONDS + 10)
        assert leased(store) == frozenset()
        assert list(store.list(names.LEASES)) == []


@pytest.mark.parametrize("error", [StorageError("a lease", "scripted"), OSError("untranslated")])
def test_a_renewal_that_fails_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class FailsOnce(MemoryStore):
        count = 0

        def replace(self, path: str, data: bytes) -> None:
            self.count += 1
            if self.count == 2:
                raise error
            super().replace(path, data)

    store = FailsOnce()
    with hold(store, committed(store), "a test", seconds=0.2):
        end = time.monotonic() + 10
        while store.count < 4 and time.monotonic() < end:
            time.sleep(0.01)
    assert store.count >= 4
    assert "could not be renewed" in caplog.text


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.LOST_ANSWER])
def test_a_lease_that_cannot_be_written_is_no_lease(fault: Fault) -> None:
    store = FaultyStore(MemoryStore(), FaultOn("replace", fault, "_leases/"))
    attempt = committed(store)
    with pytest.raises(StorageError), hold(store, attempt, "a test"):
        pytest.fail("it was held")
    assert list(store.list(names.LEASES)) == []


def test_a_lease_that_cannot_be_deleted_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    store = FaultyStore(MemoryStore(), FaultOn("delete", Fault.BEFORE, "_leases/"))
    attempt = committed(store)
    with hold(store, attempt, "a test"):
        pass
    assert leased(store) == {attempt}
    assert "will expire" in caplog.text


# ---- leases that something is wrong with ----------------------------------------------------------------------------


class Stubborn(LocalStore):
    """Deletes no lease, as where the folder belongs to somebody else."""

    def delete(self, path: str) -> None:
        """See Store."""
        if path.startswith(names.LEASES):
            raise StorageError(path, "not permitted")
        super().delete(path)


def test_an_expired_lease_that_cannot_be_deleted_keeps_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 1, 2)
    lease = lease_on(tmp_path, 1, seconds=-1)
    with mounting(), Trainer(mount(Stubborn(tmp_path)), max_to_keep=1) as trainer:
        for number in (3, 4, 5):
            trainer.saved(number)
    assert on_disk(tmp_path) == [5]
    assert (tmp_path / lease).exists()
    assert caplog.text.count(f"the lease {lease} has expired, and stays because it cannot be deleted") == 1


def test_one_lease_that_cannot_be_deleted_takes_no_other_away(store: MemoryStore) -> None:
    faulty = FaultyStore(store, FaultOn("delete", Fault.BEFORE, "_leases/"))
    first, second = committed(store), committed(store, 2)
    with hold(faulty, first, "gone", seconds=-1), hold(faulty, second, "a test"):
        assert Leases(faulty).read() == Leased(frozenset({second}))


def test_a_lease_that_cannot_be_read_counts_for_as_long_as_somebody_renews_it(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not for ever: a file that nobody touches for an hour is nobody's claim."""
    path, leases, now = names.lease_path("odd"), Leases(store), time.monotonic()
    with hold(store, committed(store), "a test"):
        store.replace(path, b"damaged")
        for later in (0, 3000, 3599):
            monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
            assert path in leases.read().failed
        written = time.time() + 1
        monkeypatch.setattr(time, "time", lambda: written)
        store.replace(path, b"damaged")
        for later in (4000, 7599):
            monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
            assert path in leases.read().failed
        monkeypatch.setattr(time, "monotonic", lambda: now + 7601)
        assert leases.read().failed == ""
        assert len(leases.read().attempts) == 1
    assert caplog.text.count("nothing is deleted while the lease") == 1
    assert caplog.text.count("it counts no longer") == 1


def test_leases_that_cannot_be_listed_are_told_once(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    class Unlisted(MemoryStore):
        def list(self, folder: str) -> Iterator[ObjectInfo]:
            raise StorageError(folder, "stale handle")

    leases = Leases(Unlisted())
    assert [leases.read().failed, leases.read().failed] == ["_leases: stale handle"] * 2
    assert caplog.text.count("the leases cannot be listed") == 1
