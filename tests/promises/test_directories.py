"""Directories that fill up, vanish, are read-only, are shared by two runs, are copied and moved; and what stays in them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

import distckpt
from distckpt.cli import main
from distckpt.coordinator.messages import Restore
from distckpt.errors import (
    CoordinatorError,
    CoordinatorFailedError,
    DamagedError,
    DirectoryLostError,
    DistckptError,
    FencedError,
    MismatchError,
    NotSharedError,
    RankFailedError,
    RestoreError,
    SaveError,
    StaleRunError,
    StorageError,
    StorageFullError,
    StoreUnsuitableError,
)
from distckpt.format import names
from distckpt.storage import LocalStore, ObjectInfo
from distckpt.testing.faulty import Call, Fault, FaultyStore
from tests.support import crashing
from tests.support.crashing import Crashing, save_against_others, save_below_a_limit
from tests.support.gang import Gang
from tests.support.mounts import small_disk
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    assert_sound_log,
    holds,
    lease_on,
    leftovers,
    mount,
    mounting,
    numbers,
    on_disk,
    run,
    settled,
    target,
    until,
)
from tests.support.warm import ROOT, run_script


@pytest.fixture(autouse=True)
def _mounting() -> Iterator[None]:
    with mounting():
        yield


# ---- full, read-only, gone ------------------------------------------------------------------------------------------


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB of its own."""
    with small_disk(tmp_path / "small", "1m") as folder:
        yield folder


def test_a_disk_that_fills_up(tmpfs: Path) -> None:
    with Trainer(tmpfs, save_timeout=30) as trainer:
        trainer.saved(1)
        ballast = tmpfs / "ballast"
        _fill_up(ballast)
        error = trainer.save(2).exception(30)
        assert isinstance(error, DistckptError)
        assert "No space left" in str(error)
        assert_loads(tmpfs / "ckpt-1", 1)
        assert trainer.manager.latest_checkpoint == f"{tmpfs}/ckpt-1"
        ballast.unlink()
        trainer.saved(3)
    assert numbers(tmpfs) == [1, 3]
    assert_loads(tmpfs / "ckpt-3", 3)
    assert_sound_log(tmpfs)


def test_a_full_disk_says_so_by_its_type(tmpfs: Path) -> None:
    trainer = Trainer(tmpfs, save_timeout=30)
    trainer.saved(1)
    _fill_up(tmpfs / "ballast")
    with pytest.raises(StorageFullError, match=r"ckpt-2.*No space left"):
        trainer.saved(2)
    (tmpfs / "ballast").unlink()
    trainer.manager.close()


def _fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for piece in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * piece)
            except OSError:
                continue


def test_room_for_the_shard_but_not_for_the_rest(tmpfs: Path) -> None:
    """The disk fills up at every single block from plenty down to none."""
    block = 4096
    with Trainer(tmpfs, max_to_keep=2, save_timeout=30) as trainer:
        trainer.saved(1)
        last, number = 1, 1
        ballast = tmpfs / "ballast"
        for spare in range(12):
            _fill_up(ballast)
            os.truncate(ballast, max(0, ballast.stat().st_size - spare * block))
            number += 1
            pending = trainer.save(number)
            time.sleep(0.1)  # an entry that found no room is tried again until there is some
            ballast.unlink()
            error = pending.exception(40)
            assert error is None or "No space left" in str(error)
            last = last if error else number
            assert numbers(tmpfs)[-1] == last
            assert_loads(tmpfs / f"ckpt-{last}", last)
        assert last > 1
    assert_sound_log(tmpfs)


def test_a_file_size_limit(tmp_path: Path) -> None:
    error, path = crashing.run(save_below_a_limit, directory=str(tmp_path), limit=2000).said
    assert error.startswith("StorageFullError")
    assert "File too large" in error
    assert path == f"{tmp_path}/ckpt-3"
    assert numbers(tmp_path) == [1, 3]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory with ckpt-1, mounted so that nothing in it can be written."""
    folder = tmp_path / "run"
    run(folder, 1)
    mount = ["mount", "--bind", str(folder), str(folder)]
    remount = ["mount", "-o", "remount,bind,ro", str(folder)]
    if any(subprocess.run(command, capture_output=True, check=False).returncode for command in (mount, remount)):
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_directory_is_readable_and_refused_by_managers(read_only: Path) -> None:
    assert_loads(read_only / "ckpt-1", 1)
    assert distckpt.latest_checkpoint(read_only) == f"{read_only}/ckpt-1"
    assert CliRunner().invoke(main, ["verify", str(read_only)]).exit_code == 0
    target().restore(read_only)
    with pytest.raises(StorageError, match="Read-only file system"):
        Trainer(read_only)


def test_a_directory_that_becomes_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Trainer(folder, save_timeout=10) as trainer:
        trainer.saved(1)
        if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        try:
            settled(folder)  # a file that is open for writing would be in the way
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
            with pytest.raises(DistckptError, match="Read-only file system"):
                trainer.saved(2)
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        trainer.saved(3)
    assert numbers(folder) == [1, 3]


@pytest.mark.parametrize("where", ["", "above"])
def test_a_file_in_the_way(tmp_path: Path, where: str) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(StorageError, match=r"file is where a folder should be|Not a directory|exists"):
        Trainer(tmp_path / "run" / where)
    assert (tmp_path / "run").read_text() == "precious"


def test_a_manager_that_cannot_be_made_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", refusing)
        with pytest.raises(StoreUnsuitableError, match="Operation not permitted"):
            Trainer(tmp_path / "above/run")
    assert list(tmp_path.iterdir()) == []
    run(tmp_path / "above/run", 1)
    assert numbers(tmp_path / "above/run") == [1]


def test_a_file_in_the_way_of_one_checkpoint(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        (tmp_path / "ckpt-2").write_text("precious")
        with pytest.raises(StorageError, match="ckpt-2"):
            trainer.saved(2)
        trainer.saved(3)
    assert (tmp_path / "ckpt-2").read_text() == "precious"
    assert numbers(tmp_path) == [1, 3]
    run(tmp_path, 4)
    assert (tmp_path / "ckpt-2").read_text() == "precious"


def test_a_restore_in_a_directory_that_has_vanished_says_so_soon_and_goes_on_once_it_is_back(tmp_path: Path) -> None:
    checkpoint = distckpt.Checkpoint(step=1)
    with distckpt.CheckpointManager(checkpoint, tmp_path / "run", save_timeout=600) as manager:
        manager.save(1).result(30)
        (tmp_path / "run").rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(RestoreError, match=r"was deleted, unmounted or moved.*restore again once it is back"):
                manager.restore()
        assert not (tmp_path / "run").exists()
        (tmp_path / "away").rename(tmp_path / "run")
        checkpoint.step = 5
        assert manager.restore() == f"{tmp_path}/run/ckpt-1"
        assert checkpoint.step == 1
        manager.save(2).result(30)


def test_ranks_in_a_directory_that_has_vanished_are_told_so_and_do_not_begin_anew(gang2: Gang, tmp_path: Path) -> None:
    for told in gang2.run("ranks.directories:restore_in_what_has_vanished", directory=str(tmp_path)):
        assert told["raised"].startswith(f"DirectoryLostError: {tmp_path}/run: "), told
        assert told["restored"] == f"{tmp_path}/run/ckpt-1"


def test_a_directory_that_vanishes_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Trainer(folder, save_timeout=10) as trainer:
        trainer.saved(1)
        folder.rename(tmp_path / "away")
        with pytest.raises(DistckptError, match="vanished"):
            trainer.saved(2)
        assert not folder.exists()
        assert trainer.manager.checkpoints == []
        (tmp_path / "away").rename(folder)
        trainer.saved(3)
    assert numbers(folder) == [1, 3]
    assert_loads(folder / "ckpt-1", 1)


@pytest.mark.parametrize("instead", ["nothing", "an empty one", "another run's"])
def test_a_run_knows_its_directory_again_after_its_coordinator_has_failed(tmp_path: Path, instead: str) -> None:
    folder = tmp_path / "run"
    with Trainer(folder, save_timeout=10) as trainer:
        trainer.saved(1)
        before = settled(folder)
        folder.rename(tmp_path / "away")
        if instead == "an empty one":
            folder.mkdir()
        elif instead == "another run's":
            for number in (7, 8, 9):
                run(folder, number)
        there = settled(folder)
        with pytest.raises(CoordinatorFailedError):
            trainer.manager._client.ask(Restore([], None), 10)  # type: ignore[arg-type]  # the machine cannot take it
        for _ in range(2):
            with pytest.raises(DirectoryLostError, match=str(folder)):
                trainer.saved(2)
        assert settled(folder) == there
        assert folder.exists() == (instead != "nothing")
        if folder.exists():
            folder.rename(tmp_path / "other")
        (tmp_path / "away").rename(folder)
        assert settled(folder) == before
        trainer.saved(3)
    assert numbers(folder) == [1, 3]
    assert_sound_log(folder)


def test_a_directory_that_is_emptied_under_a_run(tmp_path: Path) -> None:
    """Somebody cleans up by hand: what is reported as saved afterwards must be there all the same."""
    folder = tmp_path / "run"
    trainer = Trainer(folder, save_timeout=10)
    trainer.saved(1)
    settled(folder)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = trainer.save(2).exception(60)
    if error is None:
        assert_loads(folder / "ckpt-2", 2)
    with contextlib.suppress(DistckptError):
        trainer.manager.close()
    run(folder, 3)
    assert_loads(folder / "ckpt-3", 3)
    assert numbers(folder)[-1] == 3


def test_other_things_in_a_directory_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    mine = [
        "notes.txt",
        "_log/README",
        "_log/backup/00000000000000009999.json",
        "_log/123.json",
        "ckpt-2/notes.txt",
        "ckpt-5/data/manifest.json",
        "ckpt-x/y",
        "results-7/table.csv",
        "e1-0123456789abcdef0123456789abcdef/manifest.json",
    ]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (1, 1))
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/ckpt-2"
        trainer.saved(3)
        trainer.saved(5)
    assert {name: (tmp_path / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")
    assert numbers(tmp_path) == [5]
    assert_loads(tmp_path / "ckpt-5", 5)
    assert CliRunner().invoke(main, ["verify", str(tmp_path)]).exit_code == 0


@pytest.mark.parametrize("number", [10**18, 10**40, -1])
def test_numbers_that_cannot_be_stored_are_refused(tmp_path: Path, number: int) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        counter = trainer.checkpoint.save_counter
        with pytest.raises(ValueError, match="number"):
            trainer.manager.save(number)
        assert trainer.checkpoint.save_counter == counter
        trainer.saved(10**18 - 1)
    assert numbers(tmp_path) == [1, 10**18 - 1]
    assert_loads(tmp_path / "ckpt-1", 1)


# ---- a manager's life ---------------------------------------------------------------------------------------------------


def test_nothing_begins_inside_of_a_checkpoint_which_it_would_hide(tmp_path: Path) -> None:
    directory, other = tmp_path / "run-7", tmp_path / "other"
    run(directory, 1, 2)
    run(other, 3)
    with pytest.raises(
        ValueError, match=r"ckpt-1 is a checkpoint of a run, .* give its directory, .*run-7; to begin another"
    ):
        Trainer(directory / "ckpt-1")
    for command in (["cp", other, directory / "ckpt-1"], ["import", other / "ckpt-3", directory / "ckpt-1"]):
        told = CliRunner().invoke(main, [str(word) for word in command])
        assert (told.exit_code, "is a checkpoint of a run" in told.output) == (2, True), told.output
    assert_loads(directory / "ckpt-1", 1)
    run(directory / "ckpt-9", 4)  # named like one
    assert numbers(directory / "ckpt-9") == [4]


def test_a_closed_manager_says_so(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.saved(1)
    trainer.manager.close()
    for use in (
        lambda: trainer.save(2).result(5),
        lambda: trainer.save(3).result(5),
        trainer.manager.prepare,
        trainer.manager.restore_or_initialize,
        trainer.manager.restore,
    ):
        with pytest.raises((ValueError, CoordinatorError), match="closed"):
            use()
    trainer.manager.wait()
    trainer.manager.close()
    assert trainer.manager.checkpoints == [f"{tmp_path}/ckpt-1"]


def test_managers_and_saves_leave_nothing_open(tmp_path: Path) -> None:
    run(tmp_path, 1)
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for number in (2, 3, 4):
        run(tmp_path, number)
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
    with Trainer(tmp_path) as trainer:
        trainer.saved(5)
        settled(tmp_path)
        used = len(os.listdir("/proc/self/fd")), threading.active_count()
        for number in range(6, 12):
            trainer.saved(number)
        settled(tmp_path)
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == used
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_long_log_is_pruned_from_its_beginning(tmp_path: Path) -> None:
    run(tmp_path, *range(1, 41), max_to_keep=1)
    log = assert_sound_log(tmp_path)
    assert log[0].seq > 1
    assert len(log) < 80
    assert numbers(tmp_path) == [40]
    run(tmp_path, 41)
    assert_sound_log(tmp_path)
    assert numbers(tmp_path) == [40, 41]


def test_a_destination_of_other_shapes_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    import torch

    run(tmp_path, 1, 2)
    before = {"weights": torch.zeros(5, 4), "half": torch.zeros(7, dtype=torch.bfloat16)}
    checkpoint = distckpt.Checkpoint(state=before)
    with distckpt.CheckpointManager(checkpoint, tmp_path, max_to_keep=2) as manager:
        with pytest.raises(MismatchError, match=r"state\.weights \(saved \[5, 3\], here \[5, 4\]\)"):
            manager.restore_or_initialize()
        assert before["half"].tolist() == [0] * 7
        assert manager.save(3) is not None
        manager.wait()
        assert manager.restore() == f"{tmp_path}/ckpt-3"
    assert numbers(tmp_path) == [2, 3]
    assert_loads(tmp_path / "ckpt-2", 2)


@dataclass
class Hold:
    """Holds calls back that write, or do what ``operation`` says with, what ends in ``name``, until they may go on.

    Not before it ``is_set``.
    """

    name: str
    operation: str = "put"
    is_set: bool = True
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def fault(self, call: Call) -> Fault | None:
        """A delay."""
        is_held = self.is_set and call.operation.startswith(self.operation) and call.path.endswith(self.name)
        return Fault.DELAYED if is_held else None

    def sleep(self, _: float) -> None:
        """For as long as it is held back."""
        self.reached.set()
        assert self.go_on.wait(30)

    def around(self, directory: Path) -> FaultyStore:
        """The store that is held back."""
        return FaultyStore(LocalStore(directory), self, sleep=self.sleep)


@pytest.mark.parametrize("buffers", [1, 2])
def test_skip_means_that_no_buffer_is_free(tmp_path: Path, buffers: int) -> None:
    hold = Hold("00000-0.arrow")
    url = mount(hold.around(tmp_path))
    with Trainer(url, buffers=buffers, on_busy="skip") as trainer:
        pending = [trainer.save(number) for number in range(buffers)]
        assert hold.reached.wait(30)
        assert trainer.manager.save(77) is None
        hold.go_on.set()
        for one in pending:
            one.result(30)
    assert numbers(tmp_path) == list(range(buffers))
    for number in range(buffers):
        assert_loads(tmp_path / f"ckpt-{number}", number)


class LyingStore(LocalStore):
    """Takes in one byte otherwise than it was given, and says nothing."""

    lies = False

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Write, and damage."""
        info = super().put_unique(path, size, sections)
        if self.lies:
            file = Path(self.url) / path
            content = bytearray(file.read_bytes())
            content[content.rindex(b"ARROW1") // 2] ^= 16
            file.write_bytes(content)
        return info


def test_a_store_that_takes_in_other_bytes_is_found_out(tmp_path: Path) -> None:
    store = LyingStore(tmp_path)
    with Trainer(mount(store), verify=True) as trainer:
        trainer.saved(1)
        store.lies = True
        with pytest.raises(DamagedError, match=r"ckpt-2.*not what was written"):
            trainer.saved(2)
        store.lies = False
        trainer.saved(3)
    assert numbers(tmp_path) == [1, 3]
    for number in (1, 3):
        assert_loads(tmp_path / f"ckpt-{number}", number)


class OtherStore(LocalStore):
    """Says that a shard has landed, when something else has become of it."""

    fate: Callable[[Path], object] | None = None

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Write, and let it meet its fate."""
        info = super().put_unique(path, size, sections)
        if self.fate is not None:
            self.fate(Path(self.url) / path)
        return info


@pytest.mark.parametrize(
    ("fate", "error", "text"),
    [
        (Path.unlink, NotSharedError, "rank 0 .* not to be seen in .*Use a directory that all hosts share"),
        (lambda file: os.truncate(file, 100), RankFailedError, "has 100 bytes on the store"),
        (lambda file: os.truncate(file, 10**6), RankFailedError, "has 1000000 bytes on the store"),
    ],
    ids=["gone", "cut", "longer"],
)
def test_what_has_not_landed_is_not_committed(
    tmp_path: Path, fate: Callable[[Path], object], error: type[SaveError], text: str
) -> None:
    store = OtherStore(tmp_path)
    with Trainer(mount(store), save_timeout=20) as trainer:
        trainer.saved(1)
        store.fate = fate
        with pytest.raises(error, match=text):
            trainer.saved(2)
        store.fate = None
        trainer.saved(3)
    assert numbers(tmp_path) == [1, 3]
    run(tmp_path, 4)
    assert numbers(tmp_path) == [1, 3, 4]
    for number in (1, 3, 4):
        assert_loads(tmp_path / f"ckpt-{number}", number)


# ---- a process that ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["plain", "RuntimeError"])
def test_a_script_that_ends_without_closing_has_saved_all_the_same(tmp_path: Path, ending: str) -> None:
    """``save`` has accepted it. Whoever forgets to close, or dies of an exception, loses nothing for that."""
    program = (
        "import sys\nfrom tests.support.small_runs import Trainer\n"
        "trainer = Trainer(sys.argv[1])\ntrainer.saved(1)\ntrainer.save(2)\n"
    )
    if ending != "plain":
        program += f"raise {ending}\n"
    script = tmp_path.with_suffix(".py")
    script.write_text(program)
    done = run_script(script, tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == (ending != "plain")
    assert "cannot schedule new futures" not in done.stderr
    assert numbers(tmp_path) == [1, 2], done.stderr
    assert_loads(tmp_path / "ckpt-2", 2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_forked_child_neither_waits_for_a_save_nor_touches_anything(tmp_path: Path, in_flight: bool) -> None:
    """What every DataLoader worker is."""
    hold = Hold("00000-0.arrow" if in_flight else "nothing")
    with Trainer(mount(hold.around(tmp_path))) as trainer:
        if in_flight:
            pending = trainer.save(1)
            assert hold.reached.wait(30)
        else:
            trainer.saved(1)
        before = settled(tmp_path)
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join(20)
        ended = child.exitcode
        if ended is None:
            child.kill()
            child.join()
        after = settled(tmp_path)
        hold.go_on.set()
        if in_flight:
            pending.result(30)
        trainer.saved(2)
    assert ended == 0
    assert after == before
    assert numbers(tmp_path) == [1, 2]
    assert_sound_log(tmp_path)


# ---- two runs on one directory ------------------------------------------------------------------------------------------


def test_two_managers_in_one_process(tmp_path: Path) -> None:
    old = Trainer(tmp_path)
    old.saved(1)
    with Trainer(tmp_path) as new:
        assert new.manager.restore_or_initialize() == f"{tmp_path}/ckpt-1"
        new.saved(2)
        before = settled(tmp_path)
        error = old.save(3).exception(30)
        assert isinstance(error, FencedError | StaleRunError)
        assert str(tmp_path) in str(error)
        with pytest.raises(CoordinatorError):
            old.saved(4)
        changed = {path for path, content in settled(tmp_path).items() if before.get(path) != content}
        assert {path for path in changed if not path.startswith(("ckpt-3/", "ckpt-4/"))} == set()
        new.saved(5)
        old.manager.close()
        new.saved(6)
    assert numbers(tmp_path) == [1, 2, 5, 6]
    for number in (1, 2, 5, 6):
        assert_loads(tmp_path / f"ckpt-{number}", number)
    assert_sound_log(tmp_path)


def test_the_older_one_is_in_the_middle_of_a_save(tmp_path: Path) -> None:
    run(tmp_path, 1)
    hold = Hold(names.MANIFEST)
    old = Trainer(mount(hold.around(tmp_path)))
    pending = old.save(2)
    assert hold.reached.wait(30)
    with Trainer(tmp_path) as new:
        new.saved(3)
        hold.go_on.set()
        assert isinstance(pending.exception(30), FencedError | StaleRunError)
        new.saved(4)
    with pytest.raises(DistckptError):
        old.saved(5)
    old.manager.close()
    assert numbers(tmp_path) == [1, 3, 4]
    for number in (1, 3, 4):
        assert_loads(tmp_path / f"ckpt-{number}", number)
    assert_sound_log(tmp_path)
    run(tmp_path, 6)
    assert numbers(tmp_path) == [1, 3, 4, 6], "what the older one had sealed when it was fenced does not come back"


def test_who_is_superseded_while_it_restores_does_not_go_on_with_an_older_checkpoint(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(1)
        trainer.pin(1)
        trainer.saved(2)
    hold = Hold(names.MANIFEST, "read", is_set=False)
    old = Trainer(mount(hold.around(tmp_path)))
    hold.is_set = True  # who claims the directory looks at the newest manifest, too
    told: list[BaseException] = []

    def restore() -> None:
        try:
            old.manager.restore_or_initialize()
        except DistckptError as error:
            told.append(error)

    restoring = threading.Thread(target=restore)
    restoring.start()
    assert hold.reached.wait(30)
    run(tmp_path, 3, max_to_keep=1)
    assert on_disk(tmp_path) == [1, 3], "what the older one restores is gone"
    hold.go_on.set()
    restoring.join(30)
    assert [type(error) for error in told] == [FencedError]
    old.manager.close()


def test_who_is_superseded_before_it_restores_does_not_begin_anew(tmp_path: Path) -> None:
    begun: list[str] = []
    old = Trainer(tmp_path, init_fn=lambda: begun.append("afresh"))
    run(tmp_path, 1)
    with pytest.raises(FencedError):
        old.manager.restore_or_initialize()
    assert begun == []
    old.manager.close()


def test_two_managers_in_two_processes(tmp_path: Path) -> None:
    started = [Crashing(save_against_others, directory=str(tmp_path), first=first) for first in (100, 200)]
    told = [one for process in started for one in process.end().said]
    saved = {number for number, word in told if word == "saved"}
    assert {word for _, word in told if word != "saved"} <= {"FencedError", "StaleRunError"}
    log = assert_sound_log(tmp_path)
    committed = {record.number for entry in log for record in entry.state.active}
    assert committed <= {number for number, _ in told}
    assert len(saved) >= 8, told
    last = numbers(tmp_path)
    assert len(last) == 3
    for number in last:
        assert_loads(tmp_path / f"ckpt-{number}", number)


# ---- the same number twice ------------------------------------------------------------------------------------------------


def test_the_newer_attempt_at_a_number_wins(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        trainer.saved(2)
        first = trainer.saved(7)
        assert_loads(first, 7)
        state = trainer.checkpoint.state
        state["weights"].fill_(5)
        again = trainer.manager.save(7).result(30)
        assert again == first
        assert distckpt.load(again)["state"]["weights"].unique().tolist() == [5]
        trainer.manager.wait()
    assert numbers(tmp_path) == [1, 2, 7]
    assert len(list((tmp_path / "ckpt-7").iterdir())) == 1


def test_a_reader_of_the_older_attempt_is_never_torn(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(7)
        wrong, old, told, rounds = [], 0, 0, 12
        for turn in range(rounds):
            readers = [distckpt.open(tmp_path / "ckpt-7") for _ in range(4)]
            expected = readers[0].load("state")["weights"].clone()
            trainer.checkpoint.state["weights"].fill_(turn)
            trainer.checkpoint.state["nested"]["step"] = turn
            pending = trainer.manager.save(7)
            for reader in readers:
                try:
                    loaded = reader.load("state")
                    old += 1
                    if loaded["weights"].tolist() != expected.tolist():
                        wrong.append(turn)
                except DamagedError as error:
                    told += "missing" in error.reason
                time.sleep(0.01)
            pending.result(30)
        assert wrong == []
        assert old + told == 4 * rounds
        assert old > 0


# ---- what stays on disk ---------------------------------------------------------------------------------------------------


def test_only_the_newest_stay_on_disk(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=3) as trainer:
        for number in (5, 3, 9, 4, 8, 6):
            trainer.saved(number)
        trainer.manager.wait()
    assert numbers(tmp_path) == [4, 8, 6], "by save order, not by number"
    assert on_disk(tmp_path) == [4, 6, 8]
    assert leftovers(tmp_path) == set()
    assert sorted(path.name for path in tmp_path.glob("ckpt-*")) == ["ckpt-4", "ckpt-6", "ckpt-8"]


def test_none_keeps_all(tmp_path: Path) -> None:
    run(tmp_path, *range(1, 12), max_to_keep=None)
    assert on_disk(tmp_path) == list(range(1, 12))
    run(tmp_path, 12, max_to_keep=2)
    assert on_disk(tmp_path) == [11, 12]


def test_what_a_run_could_not_delete_the_next_one_does(tmp_path: Path) -> None:
    run(tmp_path, 1, 2, max_to_keep=None)
    (tmp_path / "ckpt-1" / "notes.txt").write_text("mine")
    run(tmp_path, 3, max_to_keep=1)
    assert numbers(tmp_path) == [3]
    assert (tmp_path / "ckpt-1" / "notes.txt").read_text() == "mine", "only what distckpt wrote is deleted"
    assert on_disk(tmp_path) == [1, 3]
    assert [path.name for path in (tmp_path / "ckpt-1").iterdir()] == ["notes.txt"]


def test_a_lease_keeps_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lease = lease_on(tmp_path, 1, seconds=60)
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(3)
        trainer.saved(4)
        trainer.manager.wait()
    assert_loads(tmp_path / "ckpt-1", 1)
    assert on_disk(tmp_path) == [1, 4]
    (tmp_path / lease).unlink()
    run(tmp_path, 5, max_to_keep=1)
    assert on_disk(tmp_path) == [5]


def test_a_lease_that_has_expired_keeps_nothing(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lease = lease_on(tmp_path, 1, seconds=1e-3)
    run(tmp_path, 3, max_to_keep=1)
    assert on_disk(tmp_path) == [3]
    assert not (tmp_path / lease).exists()


def test_a_lease_that_cannot_be_read_keeps_everything_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 1, 2)
    lease = lease_on(tmp_path, 1, seconds=60)
    (tmp_path / lease).write_text("{")
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 3, max_to_keep=1)
    assert lease in caplog.text, "or the disk fills up, and nobody knows why"
    assert {1, 2, 3} <= set(on_disk(tmp_path))
    (tmp_path / lease).unlink()
    run(tmp_path, 4, max_to_keep=1)
    assert on_disk(tmp_path) == [4]


def test_a_pinned_checkpoint_stays(tmp_path: Path) -> None:
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        trainer.saved(1)
        trainer.pin(1)
        for number in (2, 3):
            trainer.saved(number)
    run(tmp_path, 4, max_to_keep=1)
    assert on_disk(tmp_path) == [1, 4]
    assert_loads(tmp_path / "ckpt-1", 1)


def test_trace_a_retention_over_two_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace that TensorFlow's own test has: which are preserved is decided when they are evicted."""
    now = set_clock(monkeypatch, 3.0)
    with Trainer(tmp_path, max_to_keep=2) as trainer:
        save_at(trainer, now, {1: 10_000.0, 2: 13_610.0})
    assert_state(tmp_path, {1: "10000.0", 2: "13610.0"}, "2.0")
    with Trainer(tmp_path, max_to_keep=2, keep_checkpoint_every_n_hours=1.5) as trainer:
        save_at(trainer, now, {3: 14_330.0})
        assert_state(tmp_path, {2: "13610.0", 3: "14330.0"}, "10000.0")
        assert_on_disk(tmp_path, 1, 2, 3)
        save_at(trainer, now, {4: 16_130.0})
        assert_state(tmp_path, {3: "14330.0", 4: "16130.0"}, "10000.0")
        save_at(trainer, now, {5: 17_930.0})
        assert trainer.manager.checkpoints == [f"{tmp_path}/ckpt-4", f"{tmp_path}/ckpt-5"]
    assert_state(tmp_path, {4: "16130.0", 5: "17930.0"}, "10000.0")
    assert on_disk(tmp_path) == [1, 4, 5]
    with Trainer(tmp_path, max_to_keep=2, keep_checkpoint_every_n_hours=1.5) as trainer:
        assert trainer.manager.checkpoints == [f"{tmp_path}/ckpt-4", f"{tmp_path}/ckpt-5"]
        save_at(trainer, now, {6: 17_940.0})
        assert trainer.manager.checkpoints == [f"{tmp_path}/ckpt-5", f"{tmp_path}/ckpt-6"]
    assert_state(tmp_path, {5: "17930.0", 6: "17940.0"}, "16130.0")
    assert on_disk(tmp_path) == [1, 4, 5, 6]
    assert_listed(
        tmp_path, {"ckpt-1": ["preserved"], "ckpt-4": ["preserved"], "ckpt-5": ["active"], "ckpt-6": ["newest"]}
    )
    run(tmp_path, 7, 8, 9, max_to_keep=1)
    assert on_disk(tmp_path) == [1, 4, 9], "no later manager deletes them, whatever its settings"
    assert_loads(tmp_path / "ckpt-4", 4)
    assert CliRunner().invoke(main, ["verify", str(tmp_path)]).exit_code == 0


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Wall-clock time is what stands in the list from now on."""
    now = [seconds]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def save_at(trainer: Trainer, now: list[float], times: dict[int, float]) -> None:
    """Save these numbers, each at its time."""
    for number, at in times.items():
        now[0] = at
        trainer.saved(number)


def assert_state(directory: Path, times: dict[int, str], last_preserved: str) -> None:
    """The state file lists these, byte for byte, as soon as it is written."""
    lines = [f'model_checkpoint_path: "ckpt-{list(times)[-1]}"']
    lines += [f'all_model_checkpoint_paths: "ckpt-{number}"' for number in times]
    lines += [f"all_model_checkpoint_timestamps: {at}" for at in times.values()]
    lines += [f"last_preserved_timestamp: {last_preserved}", ""]
    until(lambda: (directory / "checkpoint").read_text().split("\n") == lines)
    assert (directory / "checkpoint").read_text().split("\n") == lines


def assert_on_disk(directory: Path, *expected: int) -> None:
    """Nothing but these numbers has files left, as soon as the rest is deleted."""
    until(lambda: on_disk(directory) == [*expected])
    assert on_disk(directory) == [*expected]


def assert_listed(directory: Path, expected: dict[str, list[str]]) -> None:
    """What ``distckpt ls`` says."""
    result = CliRunner().invoke(main, ["ls", "--json", str(directory)])
    assert result.exit_code == 0
    listed = json.loads(result.stdout)["checkpoints"]
    assert {one["checkpoint"]: one["state"] for one in listed} == expected


def test_trace_b_clock_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The other trace of TensorFlow's tests: a clock that goes back loses nothing."""
    now = set_clock(monkeypatch, 10_000.0)
    with Trainer(tmp_path, max_to_keep=1, keep_checkpoint_every_n_hours=1) as trainer:
        save_at(trainer, now, {1: 10_000.0, 2: 13_600.0})
        assert_on_disk(tmp_path, 2)
        save_at(trainer, now, {3: 17_200.0})
    assert_state(tmp_path, {3: "17200.0"}, "13600.0")
    assert on_disk(tmp_path) == [2, 3]
    assert "behind the last preserved" not in caplog.text
    now[0] = 5_000.0
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        assert "8600 s behind the last preserved checkpoint" in caplog.text
        assert trainer.manager.checkpoints == []
        assert trainer.manager.latest_checkpoint == distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-3"
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/ckpt-3"
        save_at(trainer, now, {4: 5_010.0})
        assert_state(tmp_path, {4: "5010.0"}, "5000.0")
        save_at(trainer, now, {5: 5_020.0})
        assert trainer.manager.checkpoints == [f"{tmp_path}/ckpt-5"]
    assert_state(tmp_path, {5: "5020.0"}, "5000.0")
    assert on_disk(tmp_path) == [2, 3, 5]
    assert_loads(tmp_path / "ckpt-3", 3)


def test_a_manager_that_is_only_made_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its settings nor a clock that is wrong just then."""
    now = set_clock(monkeypatch, 10_000.0)
    run(tmp_path, 1, 2, 3, max_to_keep=None)
    before = settled_but_for_the_log(tmp_path)
    now[0] = 5.0
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        assert trainer.manager.checkpoints == []
        assert trainer.manager.latest_checkpoint == f"{tmp_path}/ckpt-3"
    now[0] = 20_000.0
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        assert settled_but_for_the_log(tmp_path) == before
        assert trainer.manager.checkpoints == [f"{tmp_path}/ckpt-{number}" for number in (1, 2, 3)]
        trainer.saved(4)
    assert on_disk(tmp_path) == [4]
    assert_state(tmp_path, {4: "20000.0"}, "9999.0")


def settled_but_for_the_log(directory: Path) -> dict[str, bytes]:
    """Every file that is not an entry of the log, nor what a run has measured."""
    beside = (names.LOG, names.STATS)
    return {path: content for path, content in settled(directory).items() if not path.startswith(beside)}


# ---- copied and moved -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_copied_alone_opens(tmp_path: Path) -> None:
    run(tmp_path / "run", 1, 2)
    copy = Path(shutil.copytree(tmp_path / "run" / "ckpt-2", tmp_path / "elsewhere" / "anything"))
    shutil.rmtree(tmp_path / "run")
    assert_loads(copy, 2)
    checkpoint = target()
    checkpoint.restore(copy).assert_consumed()
    assert holds(checkpoint.state, 2)
    assert CliRunner().invoke(main, ["verify", str(copy)]).exit_code == 0


def test_a_whole_run_moved_elsewhere_goes_on(tmp_path: Path) -> None:
    before = tmp_path / "before"
    run(before, 1, 2)
    after = tmp_path / "somewhere" / "else"
    after.parent.mkdir()
    before.rename(after)
    assert distckpt.latest_checkpoint(after) == f"{after}/ckpt-2"
    assert "before" not in (after / "checkpoint").read_text()
    state = distckpt.get_checkpoint_state(after)
    assert state is not None
    assert state.model_checkpoint_path == f"{after}/ckpt-2"
    with Trainer(after) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{after}/ckpt-2"
        trainer.saved(3)
    assert numbers(after) == [1, 2, 3]
    for number in (1, 2, 3):
        assert_loads(after / f"ckpt-{number}", number)
    assert not before.exists()


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_checkpoint_of_another_run_that_is_copied_here_is_left_alone(tmp_path: Path, epochs: int) -> None:
    """Neither resumed from, as if a save of this run had only lacked its commit, nor collected as garbage."""
    for epoch in range(epochs):
        run(tmp_path / "other", 50 + epoch)
    for number in (1, 2):
        run(tmp_path / "run", number)
    name = f"ckpt-{50 + epochs - 1}"
    shutil.copytree(tmp_path / "other" / name, tmp_path / "run" / name)
    for path in (tmp_path / "run" / name).rglob("*"):
        os.utime(path, (1, 1))
    with Trainer(tmp_path / "run") as trainer:
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/run/ckpt-2"
        trainer.saved(3)
    run(tmp_path / "run", 4)
    assert numbers(tmp_path / "run") == [1, 2, 3, 4]
    moved = shutil.move(tmp_path / "run" / name, tmp_path / "moved")
    assert_loads(moved, 50 + epochs - 1)


# ---- by other names ---------------------------------------------------------------------------------------------------


@pytest.fixture
def spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ways to write the directory ``run`` below ``tmp_path``, which is not there yet but for a link to it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "run").mkdir()
    (tmp_path / "run").symlink_to("disk/run")
    (tmp_path / "above").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return ["run", f"{tmp_path}/disk/run", f"file://{tmp_path}/run", "./above/run//", "disk/../run/", "~/above/run"]


def test_a_directory_by_other_names(tmp_path: Path, spellings: list[str]) -> None:
    """Relative paths, links, URLs: one directory, one log, and paths that can be compared."""
    true = f"{tmp_path}/disk/run"
    for number, spelling in enumerate(spellings, start=1):
        with Trainer(spelling, max_to_keep=None) as trainer:
            assert trainer.manager.directory == true
            assert trainer.saved(number) == trainer.manager.latest_checkpoint == f"{true}/ckpt-{number}"
            for other in spellings:
                assert trainer.manager.restore(f"{other.rstrip('/')}/ckpt-1/") == f"{true}/ckpt-1"
                assert trainer.manager.restore(other) == distckpt.latest_checkpoint(other) == f"{true}/ckpt-{number}"
                assert distckpt.wait_for_new_checkpoint(true, f"{other}/ckpt-{number}", timeout=0) is None
    assert numbers(true) == [1, 2, 3, 4, 5, 6]
    assert_sound_log(true)


def test_two_managers_by_two_names_are_on_one_directory(tmp_path: Path, spellings: list[str]) -> None:
    old = Trainer(spellings[0])
    old.saved(1)
    with Trainer(spellings[3]) as new:
        assert new.manager.restore_or_initialize() == f"{tmp_path}/disk/run/ckpt-1"
        new.saved(2)
        assert isinstance(old.save(3).exception(30), FencedError | StaleRunError)
        old.manager.close()
    assert numbers(tmp_path / "disk" / "run") == [1, 2]


def test_a_manager_keeps_its_directory_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with Trainer("run") as trainer:
        trainer.saved(1)
        monkeypatch.chdir("elsewhere")
        trainer.saved(2)
        assert trainer.manager.restore_or_initialize() == f"{tmp_path}/run/ckpt-2"
        assert trainer.manager.checkpoints == [f"{tmp_path}/run/ckpt-1", f"{tmp_path}/run/ckpt-2"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert_loads("../run/ckpt-2", 2)


@pytest.mark.parametrize("way", ["link", "mount"])
def test_ranks_may_come_by_other_names(tmp_path: Path, way: str) -> None:
    """On each host another way may lead to the directory; the ranks meet at one coordinator all the same."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    if way == "link":
        other.symlink_to("run")
    else:
        other.mkdir()
        if subprocess.run(["mount", "--bind", str(run), str(other)], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
    try:
        with Gang(2) as gang:
            saved = gang.run("ranks.directories:save_by_own_name", directories=[str(run), str(other)])
    finally:
        if way == "mount":
            subprocess.run(["umount", "-l", str(other)], check=True)
    assert saved == [f"{run}/ckpt-1", f"{run if way == 'link' else other}/ckpt-1"]
    assert numbers(run) == [1]
    assert_sound_log(run)
