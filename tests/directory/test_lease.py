"""A lease keeps retention away from what is being read, for as long as it is renewed and no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import crc32c
import pytest
import torch

import distckpt
from distckpt.directory.lease import LEASE_SECONDS, HeldLease, hold
from distckpt.directory.leases import Leased, Leases
from distckpt.directory.log import read_tail
from distckpt.errors import CheckpointNotFoundError, LeaseLostError, StorageError
from distckpt.format import names
from distckpt.format.json.sealed import seal_of
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, Store
from distckpt.testing.faults import Fault, FaultOn
from distckpt.testing.faulty import FaultyStore
from tests.support.checkpoints import append_state, commit, new_attempt, put_manifest
from tests.support.clock import Clock
from tests.support.small_runs import Trainer, lease_on, mount, mounting, on_disk, run, until


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
    clock, attempt = Clock(), committed(store)
    leases = Leases(store, clock)
    held = HeldLease.take(store, attempt, "a test", 0.2, clock=Clock())
    for _ in range(3):
        assert leases.read().attempts == {attempt}
        before = store.read(names.lease_path(held.id), 1 << 16)
        clock.now += 0.19
        assert until(lambda before=before: store.read(names.lease_path(held.id), 1 << 16) != before)
    held.release()
    assert list(store.list(names.LEASES)) == []


def test_what_a_killed_reader_left_behind_expires(store: MemoryStore) -> None:
    clock, attempt = Clock(), committed(store)
    leases = Leases(store, clock)
    HeldLease.take(store, attempt, "a test", clock=clock)
    assert leases.read().attempts == {attempt}
    clock.now += LEASE_SECONDS - 1
    assert leases.read().attempts == {attempt}
    clock.now += 2
    assert leases.read().attempts == frozenset()
    assert list(store.list(names.LEASES)) == []


def test_who_sees_a_lease_for_the_first_time_waits_for_all_of_its_duration(store: MemoryStore) -> None:
    """However long ago it was written: whether it is renewed is not known yet."""
    clock, attempt = Clock(), committed(store)
    HeldLease.take(store, attempt, "a test", clock=clock)
    clock.now += 10 * LEASE_SECONDS
    leases = Leases(store, clock)
    assert leases.read().attempts == {attempt}
    clock.now += LEASE_SECONDS
    assert leases.read().attempts == frozenset()


@pytest.mark.parametrize("behind", [120.0, 86400.0, -86400.0])
def test_a_reader_whose_wall_clock_is_wrong_keeps_what_it_reads(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, behind: float
) -> None:
    clock, attempt, now = Clock(), committed(store), time.time()
    leases = Leases(store, clock)
    monkeypatch.setattr(time, "time", lambda: now - behind)
    with hold(store, attempt, "a test"):
        monkeypatch.setattr(time, "time", lambda: now)
        for _ in range(3):
            assert leases.read().attempts == {attempt}
            clock.now += LEASE_SECONDS / 3


def test_a_renewal_that_the_store_is_late_to_write_does_not_look_like_an_old_one(store: MemoryStore) -> None:
    clock, attempt = Clock(), committed(store)
    leases = Leases(store, clock)
    held = HeldLease.take(store, attempt, "a test", clock=clock)
    path = names.lease_path(held.id)
    first = store.read(path, 1 << 16)
    assert leases.read().attempts == {attempt}
    clock.now += LEASE_SECONDS
    store.replace(path, first)  # what lies between has come and gone
    assert leases.read().attempts == {attempt}
    held.release()


class Silent(MemoryStore):
    """Takes a lease once, and renews none."""

    is_silent = False

    def replace(self, path: str, data: bytes) -> None:
        """See Store."""
        if self.is_silent:
            raise StorageError(path, "no answer")
        super().replace(path, data)


def test_who_could_not_renew_knows_it_before_anybody_may_delete() -> None:
    store, clock = Silent(), Clock()
    attempt = committed(store)
    held = HeldLease.take(store, attempt, "a test", clock=clock)
    store.is_silent = True
    leases = Leases(store, clock)
    assert leases.read().attempts == {attempt}
    clock.now += LEASE_SECONDS - 1
    with pytest.raises(LeaseLostError, match=attempt):
        held.check()
    assert leases.read().attempts == {attempt}
    held.release()


def test_a_lease_that_was_lost_stays_lost_and_is_renewed_no_more(store: MemoryStore) -> None:
    clock, attempt, others = Clock(), committed(store), set(threading.enumerate())
    held = HeldLease.take(store, attempt, "a test", 0.2, clock=clock)
    clock.now += 1
    with pytest.raises(LeaseLostError):
        held.check()
    written = store.read(names.lease_path(held.id), 1 << 16)
    clock.now -= 1  # as if there were time left
    assert until(lambda: set(threading.enumerate()) <= others)
    with pytest.raises(LeaseLostError):
        held.check()
    assert store.read(names.lease_path(held.id), 1 << 16) == written
    held.release()
    held.release()
    assert list(store.list(names.LEASES)) == []


def test_a_renewal_that_is_answered_too_late_renews_nothing() -> None:
    """Whoever wants to delete may have seen the old one for the last time, and taken the lease for dead."""
    clock = Clock()

    class Late(MemoryStore):
        renewals = 0

        def replace(self, path: str, data: bytes) -> None:
            if path.startswith(names.LEASES):
                self.renewals += 1
                if self.renewals == 2:
                    clock.now += 10
            super().replace(path, data)

    store = Late()
    held = HeldLease.take(store, committed(store), "a test", 0.2, clock=clock)
    clock.now += 0.1
    assert until(lambda: store.renewals == 2)
    with pytest.raises(LeaseLostError):
        held.check()
    held.release()


@pytest.mark.parametrize("times", [1, 99])
def test_who_stood_still_while_it_took_a_lease_takes_another_one(times: int) -> None:
    """Else a follower that is suspended at the wrong moment ends with an error when it wakes up."""
    clock = Clock()

    class Late(MemoryStore):
        left = times

        def replace(self, path: str, data: bytes) -> None:
            super().replace(path, data)
            if path.startswith(names.LEASES) and self.left:
                self.left -= 1
                clock.now += 1000

    store = Late()
    attempt = committed(store)
    if times > 1:
        with pytest.raises(LeaseLostError):
            HeldLease.take(store, attempt, "a test", clock=clock)
        assert list(store.list(names.LEASES)) == []
        return
    held = HeldLease.take(store, attempt, "a test", clock=clock)
    held.check()
    assert [info.path for info in store.list(names.LEASES)] == [names.lease_path(held.id)]
    held.release()


def test_a_lease_of_another_version_is_one_that_cannot_be_read(store: MemoryStore) -> None:
    """A job and its readers may be of different releases: who cannot tell what is meant deletes nothing."""
    body = b'{"format":1,"attempt":"%s","holder":"old","expires":1.0' % committed(store).encode()
    store.replace(names.lease_path("old"), body + seal_of(crc32c.crc32c(body)))
    clock = Clock()
    leases = Leases(store, clock)
    assert "format version 1" in leases.read().failed
    clock.now += 3601
    assert leases.read() == Leased(frozenset())


@pytest.mark.parametrize("seconds", [0.0, -1.0, 90000.0, float("nan")])
def test_a_lease_lasts_for_a_day_at_most(store: MemoryStore, seconds: float) -> None:
    with pytest.raises(ValueError, match="Lease"):
        HeldLease.take(store, committed(store), "a test", seconds)
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
    held = HeldLease.take(store, committed(store), "a test", 0.2, clock=Clock())
    assert until(lambda: store.count >= 4)
    held.check()
    held.release()
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
    lease = lease_on(tmp_path, 1, seconds=1e-3)
    with mounting(), Trainer(mount(Stubborn(tmp_path)), max_to_keep=1) as trainer:
        for number in (3, 4, 5):
            trainer.saved(number)
    assert on_disk(tmp_path) == [5]
    assert (tmp_path / lease).exists()
    assert caplog.text.count(f"the lease {lease} has expired, and stays because it cannot be deleted") == 1


def test_one_lease_that_cannot_be_deleted_takes_no_other_away(store: MemoryStore) -> None:
    faulty = FaultyStore(store, FaultOn("delete", Fault.BEFORE, "_leases/"))
    first, second = committed(store), committed(store, 2)
    clock = Clock()
    leases = Leases(faulty, clock)
    with hold(faulty, first, "dead", seconds=60), hold(faulty, second, "a test"):
        assert leases.read() == Leased(frozenset({first, second}))
        clock.now += 60
        assert leases.read() == Leased(frozenset({second}))


def test_a_lease_that_cannot_be_read_counts_for_as_long_as_somebody_renews_it(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """And not for ever: a file that nobody touches for an hour is nobody's claim."""
    clock, path = Clock(), names.lease_path("odd")
    leases = Leases(store, clock)
    store.replace(path, b"damaged")
    for later in (0, 3000, 599):
        clock.now += later
        assert path in leases.read().failed
    store.replace(path, b"damaged in another way")
    for later in (0, 3599):
        clock.now += later
        assert path in leases.read().failed
    clock.now += 2
    assert leases.read().failed == ""
    assert [info.path for info in leases.unreadable] == [path]
    assert caplog.text.count("nothing is deleted while the lease") == 1
    assert caplog.text.count("it counts no longer") == 1


def test_leases_that_cannot_be_listed_are_told_once(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    class Unlisted(MemoryStore):
        def list(self, folder: str) -> Iterator[ObjectInfo]:
            raise StorageError(folder, "stale handle")

    leases = Leases(Unlisted())
    assert [leases.read().failed, leases.read().failed] == ["_leases: stale handle"] * 2
    assert caplog.text.count("the leases cannot be listed") == 1
