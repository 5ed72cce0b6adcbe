from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import distckpt
import distckpt.iterators
from distckpt.directory.log import read_entry, read_tail, sequence_numbers
from distckpt.directory.newest import newest_committed
from distckpt.errors import CheckpointNotFoundError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.json.log import State
from distckpt.iterators import checkpoints_iterator, wait_for_new_checkpoint
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, open_store
from tests.support.checkpoints import append_state, commit, commit_bare, new_attempt, put_manifest
from tests.support.small_runs import mount, mounting, until


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iterator looks every 20 ms instead of every second."""
    monkeypatch.setattr(distckpt.iterators, "POLL_SECONDS", 0.02)


@pytest.fixture
def later() -> Iterator[Callable[[float, Callable[[], object]], None]]:
    """Does something in another thread after some seconds."""
    timers: list[threading.Timer] = []

    def do(seconds: float, work: Callable[[], object]) -> None:
        timers.append(threading.Timer(seconds, work))
        timers[-1].start()

    yield do
    for timer in timers:
        timer.join()


def begin(directory: Path) -> None:
    """What comes before the first save: the directory is claimed in its log."""
    append_state(open_store(directory), lambda state: state, kind="claim")


class CountingStore(LocalStore):
    """Counts what is asked of the store."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[str] = []

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        self.calls.append(f"list {folder}")
        return super().list(folder)

    def read(self, path: str, max_bytes: int) -> bytes:
        self.calls.append(f"read {path}")
        return super().read(path, max_bytes)

    def stat(self, path: str) -> ObjectInfo | None:
        self.calls.append(f"stat {path}")
        return super().stat(path)


# ---- waiting for one ----------------------------------------------------------------------------------------------


def test_what_is_there_already_is_returned_at_once(tmp_path: Path) -> None:
    path = commit_bare(tmp_path, 1)
    assert path == f"{tmp_path}/ckpt-1"
    assert wait_for_new_checkpoint(tmp_path, timeout=0) == path
    assert wait_for_new_checkpoint(str(tmp_path), None, 1, None) == path


def test_the_newest_is_the_last_one_saved(tmp_path: Path) -> None:
    commit_bare(tmp_path, 10)
    older_number = commit_bare(tmp_path, 9)
    assert wait_for_new_checkpoint(tmp_path, timeout=0) == older_number


def test_the_last_one_is_not_new(tmp_path: Path) -> None:
    path = commit_bare(tmp_path, 1)
    assert wait_for_new_checkpoint(tmp_path, path, 0.01, 0.05) is None
    assert wait_for_new_checkpoint(tmp_path, Path(path), 0.01, 0.05) is None
    assert wait_for_new_checkpoint(tmp_path, f"{tmp_path}/ckpt-0", timeout=0) == path


def test_the_last_one_may_be_written_as_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commit_bare("run", 1)
    assert wait_for_new_checkpoint("run", "run/ckpt-1", timeout=0) is None


def test_the_last_one_may_be_what_save_returned(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path) as manager:
        pending = manager.save(1)
        assert wait_for_new_checkpoint(tmp_path, timeout=30) == str(pending)
        assert wait_for_new_checkpoint(tmp_path, pending, 0.01, 0.05) is None


def test_going_back_to_an_older_number_is_new(tmp_path: Path) -> None:
    five = commit_bare(tmp_path, 5)
    three = commit_bare(tmp_path, 3)
    assert wait_for_new_checkpoint(tmp_path, five, timeout=0) == three


def test_the_same_path_saved_again_is_not_new_when_paths_are_compared(tmp_path: Path) -> None:
    path = commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 1)
    assert wait_for_new_checkpoint(tmp_path, path, 0.01, 0.05) is None


def test_a_timeout_ends_neither_early_nor_a_whole_pause_late(tmp_path: Path) -> None:
    started = time.monotonic()
    assert wait_for_new_checkpoint(tmp_path, None, seconds_to_sleep=30, timeout=0.3) is None
    assert 0.3 <= time.monotonic() - started < 20


def test_the_last_moment_of_a_timeout_is_looked_at(
    tmp_path: Path, later: Callable[[float, Callable[[], object]], None]
) -> None:
    begin(tmp_path)
    later(0.1, lambda: commit_bare(tmp_path, 1))
    assert wait_for_new_checkpoint(tmp_path, None, seconds_to_sleep=30, timeout=2) == f"{tmp_path}/ckpt-1"


def test_a_directory_that_does_not_exist_is_waited_for(
    tmp_path: Path, later: Callable[[float, Callable[[], object]], None]
) -> None:
    directory = tmp_path / "later" / "run"
    assert wait_for_new_checkpoint(directory, timeout=0) is None
    assert not (tmp_path / "later").exists()
    later(0.1, lambda: (begin(directory), commit_bare(directory, 7)))
    assert wait_for_new_checkpoint(directory, seconds_to_sleep=0.02) == f"{directory}/ckpt-7"


def test_a_commit_by_another_process_is_seen(tmp_path: Path) -> None:
    begin(tmp_path)
    script = f"import time; time.sleep(0.2); from tests.support.checkpoints import commit_bare; commit_bare({str(tmp_path)!r}, 3)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2]) as trainer:
        assert wait_for_new_checkpoint(tmp_path, seconds_to_sleep=0.02, timeout=50) == f"{tmp_path}/ckpt-3"
    assert trainer.returncode == 0


def test_a_url_is_watched_like_a_path() -> None:
    store = MemoryStore.named("watching-test")
    assert wait_for_new_checkpoint(store.url, timeout=0) is None
    assert commit_bare(store.url, 1) == wait_for_new_checkpoint(store.url, timeout=0) == "memory://watching-test/ckpt-1"


# ---- what counts as committed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "follow", [distckpt.wait_for_new_checkpoint, lambda path: next(distckpt.checkpoints_iterator(path))]
)
def test_what_follows_a_checkpoint_instead_of_its_run_is_told_so(
    tmp_path: Path, follow: Callable[[Path], object]
) -> None:
    """It would wait for ever."""
    commit_bare(tmp_path, 1)
    with pytest.raises(ValueError, match=f"ckpt-1 is a checkpoint of a run. .* give its directory: {tmp_path}$"):
        follow(tmp_path / "ckpt-1")
    named_alike = tmp_path / "elsewhere" / "ckpt-1"
    commit_bare(named_alike, 2)
    assert follow(named_alike) == f"{named_alike}/ckpt-2"


def test_an_uncommitted_attempt_is_never_seen(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    begin(tmp_path)
    put_manifest(store, 2, new_attempt())
    assert wait_for_new_checkpoint(tmp_path, timeout=0) is None
    path = commit_bare(tmp_path, 1)
    put_manifest(store, 3, new_attempt())
    assert wait_for_new_checkpoint(tmp_path, timeout=0) == path


def test_a_retiring_checkpoint_is_never_seen(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    append_state(open_store(tmp_path), lambda state: State(retiring=state.active), kind="retire")
    assert wait_for_new_checkpoint(tmp_path, timeout=0) is None


def test_a_preserved_checkpoint_is_seen_when_it_is_all_there_is(tmp_path: Path) -> None:
    path = commit_bare(tmp_path, 1)
    append_state(open_store(tmp_path), lambda state: State(preserved=state.active), kind="retire")
    assert wait_for_new_checkpoint(tmp_path, timeout=0) == path


def test_a_checkpoint_without_its_manifest_is_not_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path)
    record = put_manifest(store, 1, new_attempt())
    commit(store, record)
    store.delete(f"{names.attempt_folder('ckpt', 1, record.attempt)}/{names.MANIFEST}")
    assert wait_for_new_checkpoint(tmp_path, timeout=0) is None
    assert f"{tmp_path}/ckpt-1" in caplog.text


def test_a_damaged_entry_is_passed_over(tmp_path: Path) -> None:
    path = commit_bare(tmp_path, 1)
    (tmp_path / names.entry_path(2)).write_bytes(b"{")
    assert wait_for_new_checkpoint(tmp_path, timeout=0) == path


def test_a_log_with_nothing_readable_is_an_error(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    (tmp_path / names.entry_path(1)).write_bytes(b"{")
    with pytest.raises(DamagedError):
        wait_for_new_checkpoint(tmp_path, timeout=0)


def test_a_look_without_news_is_one_listing(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    store = CountingStore(tmp_path)
    follower = distckpt.iterators._Follower(store)
    first = follower.look()
    store.calls.clear()
    assert follower.look() == first
    assert store.calls == ["list _log"]
    commit_bare(tmp_path, 2)
    store.calls.clear()
    assert follower.look() != first
    assert len(store.calls) <= 4


class Undeleting(LocalStore):
    """Deletes no manifest while ``held``, as a store that is slow to do so."""

    held = True

    def delete(self, path: str) -> None:
        if self.held and path.endswith(names.MANIFEST):
            raise StorageError(path, "not now")
        super().delete(path)


def test_a_checkpoint_that_is_being_retired_is_never_seen_though_it_is_still_whole(tmp_path: Path) -> None:
    with mounting():
        store = Undeleting(tmp_path)
        with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), mount(store), max_to_keep=1) as manager:
            checkpoints = checkpoints_iterator(tmp_path, timeout=0)
            manager.save(1).result(30)
            assert next(checkpoints) == f"{tmp_path}/ckpt-1"
            manager.save(2).result(30)
            until(lambda: [record.number for record in read_tail(store).state.retiring] == [1])
            assert list((tmp_path / "ckpt-1").glob("*/manifest.json"))
            assert next(checkpoints) == f"{tmp_path}/ckpt-2"
            assert wait_for_new_checkpoint(tmp_path, f"{tmp_path}/ckpt-2", timeout=0) is None
            assert list(checkpoints_iterator(tmp_path, timeout=0)) == [f"{tmp_path}/ckpt-2"]
            with pytest.raises(CheckpointNotFoundError):
                distckpt.open(tmp_path / "ckpt-1")
            store.held = False


@pytest.mark.usefixtures("quick")
def test_each_one_yielded_was_the_newest_while_it_was_looked_for(tmp_path: Path) -> None:
    """Against a manager that saves, retires and deletes as fast as it can."""
    store, total, over = LocalStore(tmp_path), 40, threading.Event()

    def train() -> None:
        with distckpt.CheckpointManager(distckpt.Checkpoint(a=1), tmp_path, max_to_keep=1) as manager:
            for number in range(1, total + 1):
                manager.save(number).result(30)
        over.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    seen, wrong = [], []
    checkpoints = checkpoints_iterator(tmp_path, timeout=0.01, timeout_fn=over.is_set)
    while True:
        asked = max(sequence_numbers(store), default=0)
        path = next(checkpoints, None)
        if path is None:
            break
        seen.append(path)
        entries = [read_entry(store, seq) for seq in sequence_numbers(store) if seq >= asked]
        newest = {f"{tmp_path}/ckpt-{entry.state.active[-1].number}" for entry in entries if entry.state.active}
        wrong += [path] * (path not in newest)
    trainer.join()
    assert wrong == []
    assert seen[-1] == f"{tmp_path}/ckpt-{total}"
    assert len(seen) == len(set(seen)) > 1


# ---- iterating ----------------------------------------------------------------------------------------------------


def test_nothing_happens_before_the_first_next(tmp_path: Path) -> None:
    checkpoints = checkpoints_iterator(tmp_path, timeout=0)
    path = commit_bare(tmp_path, 1)
    assert next(checkpoints) == path


def test_a_relative_path_means_what_it_meant_when_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = checkpoints_iterator("run", timeout=0)
    path = commit_bare(tmp_path / "run", 1)
    monkeypatch.chdir("/")
    assert list(checkpoints) == [path]
    with pytest.raises(ValueError, match="not a directory"):
        checkpoints_iterator("", timeout=0)


def test_it_ends_at_a_timeout_without_a_function(tmp_path: Path) -> None:
    assert list(checkpoints_iterator(tmp_path, timeout=0)) == []
    path = commit_bare(tmp_path, 1)
    assert list(checkpoints_iterator(tmp_path, timeout=0)) == [path]


def test_only_the_newest_is_yielded_and_none_twice(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    checkpoints = checkpoints_iterator(tmp_path, timeout=0)
    assert next(checkpoints) == f"{tmp_path}/ckpt-2"
    commit_bare(tmp_path, 3)
    commit_bare(tmp_path, 4)
    assert list(checkpoints) == [f"{tmp_path}/ckpt-4"]


def test_the_same_path_saved_again_is_yielded_again(tmp_path: Path) -> None:
    path = commit_bare(tmp_path, 1)
    checkpoints = checkpoints_iterator(tmp_path, timeout=0)
    assert next(checkpoints) == path
    commit_bare(tmp_path, 1)
    assert list(checkpoints) == [path]


@pytest.mark.usefixtures("quick")
def test_commits_are_yielded_in_order_while_it_waits(tmp_path: Path) -> None:
    total = 8
    begin(tmp_path)

    def train() -> None:
        for number in range(1, total + 1):
            commit_bare(tmp_path, number)
            time.sleep(0.05)

    trainer = threading.Thread(target=train)
    trainer.start()
    seen = []
    for path in checkpoints_iterator(tmp_path, timeout=30):
        seen.append(int(path.rpartition("-")[2]))
        if seen[-1] == total:
            break
    trainer.join()
    assert seen == sorted(set(seen))
    assert len(seen) > 1


@pytest.mark.usefixtures("quick")
def test_timeout_fn_is_asked_only_after_timeouts(tmp_path: Path) -> None:
    calls: list[int] = []

    def is_over() -> bool:
        calls.append(len(yielded))
        return len(calls) > 3

    yielded: list[str] = []
    commit_bare(tmp_path, 1)
    for path in checkpoints_iterator(tmp_path, timeout=0.01, timeout_fn=is_over):
        yielded.append(path)
        if len(yielded) == 1:
            commit_bare(tmp_path, 2)
    assert yielded == [f"{tmp_path}/ckpt-1", f"{tmp_path}/ckpt-2"]
    assert calls == [2, 2, 2, 2]


@pytest.mark.usefixtures("quick")
def test_a_false_timeout_fn_waits_again(tmp_path: Path) -> None:
    calls = []

    def is_over() -> bool:
        calls.append(None)
        if len(calls) == 2:
            commit_bare(tmp_path, 1)
        return len(calls) == 4

    assert list(checkpoints_iterator(tmp_path, timeout=0, timeout_fn=is_over)) == [f"{tmp_path}/ckpt-1"]
    assert len(calls) == 4


@pytest.mark.usefixtures("quick")
def test_without_a_timeout_it_waits_for_ever_and_timeout_fn_is_never_asked(
    tmp_path: Path, later: Callable[[float, Callable[[], object]], None]
) -> None:
    commit_bare(tmp_path, 1)
    checkpoints = checkpoints_iterator(tmp_path, timeout_fn=lambda: pytest.fail("it was asked"))
    assert next(checkpoints) == f"{tmp_path}/ckpt-1"
    later(0.2, lambda: commit_bare(tmp_path, 2))
    assert next(checkpoints) == f"{tmp_path}/ckpt-2"


@pytest.mark.usefixtures("quick")
def test_each_wait_has_the_whole_timeout(tmp_path: Path, later: Callable[[float, Callable[[], object]], None]) -> None:
    """However long the consumer took."""
    commit_bare(tmp_path, 1)
    checkpoints = checkpoints_iterator(tmp_path, timeout=2)
    assert next(checkpoints) == f"{tmp_path}/ckpt-1"
    time.sleep(2.1)
    later(0.1, lambda: commit_bare(tmp_path, 2))
    assert next(checkpoints) == f"{tmp_path}/ckpt-2"


def test_a_false_timeout_fn_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distckpt.iterators, "POLL_SECONDS", 0.1)
    started = time.monotonic()
    moments = []

    def is_over() -> bool:
        moments.append(time.monotonic())
        return len(moments) == 4

    assert list(checkpoints_iterator(tmp_path, timeout=0, timeout_fn=is_over)) == []
    assert moments[-1] - started >= 0.3


def test_an_error_of_timeout_fn_comes_out(tmp_path: Path) -> None:
    def is_over() -> bool:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        list(checkpoints_iterator(tmp_path, timeout=0, timeout_fn=is_over))


@pytest.mark.usefixtures("quick")
def test_min_interval_lies_between_yields_and_lets_a_slow_consumer_go_on(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    checkpoints = checkpoints_iterator(tmp_path, min_interval_secs=0.3, timeout=5)
    next(checkpoints)
    first = time.monotonic()
    commit_bare(tmp_path, 2)
    next(checkpoints)
    assert time.monotonic() - first >= 0.25
    commit_bare(tmp_path, 3)
    time.sleep(0.3)
    assert next(checkpoints) == f"{tmp_path}/ckpt-3"


def test_a_run_that_starts_over_in_an_emptied_directory_is_seen(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    commit_bare(directory, 1)
    commit_bare(directory, 2)
    checkpoints = checkpoints_iterator(directory, timeout=0, timeout_fn=lambda: False)
    assert next(checkpoints) == f"{directory}/ckpt-2"
    shutil.rmtree(directory)
    commit_bare(directory, 1)
    assert next(checkpoints) == f"{directory}/ckpt-1"


def test_a_newest_that_was_retired_while_the_log_was_read_is_skipped(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    record = put_manifest(store, 1, new_attempt())
    commit(store, record)

    class Racing(CountingStore):
        def read(self, path: str, max_bytes: int) -> bytes:
            data = super().read(path, max_bytes)
            if path == names.entry_path(1):
                store.delete(f"{names.attempt_folder('ckpt', 1, record.attempt)}/{names.MANIFEST}")
                append_state(
                    store,
                    lambda state: msgspec.structs.replace(state, active=(second,), retiring=(record,)),
                    kind="retire",
                )
            return data

    second = put_manifest(store, 2, new_attempt())
    assert newest_committed(Racing(tmp_path)) == second
