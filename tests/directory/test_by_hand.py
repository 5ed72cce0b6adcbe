"""What people do to a run's directory with cp, mv and rm, and what readers and managers make of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli import main
from distckpt.directory.log import sequence_numbers
from distckpt.errors import CheckpointNotFoundError, DamagedError, DistckptError, LogMissingError
from distckpt.format import names
from distckpt.storage import LocalStore, MemoryStore, open_store
from tests.support.checkpoints import append_state, commit_bare, new_attempt, put_manifest
from tests.support.gang import Gang
from tests.support.small_runs import Trainer, assert_loads, assert_sound_log, files, holds, numbers, run, target


def cli(*args: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, args)))


# ---- one folder copied alone --------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """``ckpt-5`` of a run, copied alone into a new directory."""
    run(tmp_path / "run", 4, 5)
    return Path(shutil.copytree(tmp_path / "run" / "ckpt-5", tmp_path / "new" / "ckpt-5"))


def test_a_folder_copied_alone_into_a_new_directory_opens(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_loads(copied, 5)
    assert distckpt.checkpoint_exists(copied)
    checkpoint = target()
    monkeypatch.chdir(copied.parent.parent)
    checkpoint.restore("new/ckpt-5").assert_consumed()
    assert holds(checkpoint.state, 5)
    for command in ("show", "verify"):
        assert cli(command, "new/ckpt-5").exit_code == 0
    (copied.parent / "link").symlink_to("ckpt-5")
    assert_loads("new/link", 5)


def test_the_directory_of_a_copy_is_not_taken_for_a_fresh_one(copied: Path) -> None:
    assert_refused(copied.parent, "ckpt-5")


def test_a_copy_beside_a_log_is_not_of_it_and_everybody_says_what_to_do(copied: Path, tmp_path: Path) -> None:
    run(tmp_path / "other", 1)
    shutil.copytree(copied, tmp_path / "other" / "ckpt-5")
    advice = f"run `distckpt adopt {tmp_path}/other`"
    with pytest.raises(CheckpointNotFoundError, match=advice):
        distckpt.open(tmp_path / "other" / "ckpt-5")
    with pytest.raises(CheckpointNotFoundError) as without:
        distckpt.open(tmp_path / "other" / "ckpt-6")
    assert "adopt" not in str(without.value)
    with Trainer(tmp_path / "other") as trainer:
        for which in (5, f"{tmp_path}/other/ckpt-5"):
            with pytest.raises(CheckpointNotFoundError, match=advice):
                trainer.manager.restore(which)
        with pytest.raises(CheckpointNotFoundError) as without:
            trainer.manager.restore(6)
        assert "adopt" not in str(without.value)
        assert trainer.manager.restore() == f"{tmp_path}/other/ckpt-1"


# ---- a log that is gone -------------------------------------------------------------------------------------------------


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A run of three checkpoints whose log was deleted; everything in it is old."""
    run(tmp_path / "run", 1, 2, 10)
    shutil.rmtree(tmp_path / "run" / names.LOG)
    for file in (tmp_path / "run").rglob("*"):
        os.utime(file, (1, 1))
    return tmp_path / "run"


READERS: dict[str, Callable[[Path], Any]] = {
    "latest_checkpoint": distckpt.latest_checkpoint,
    "checkpoints_iterator": lambda path: list(distckpt.checkpoints_iterator(path, timeout=0)),
    "wait_for_new_checkpoint": lambda path: distckpt.wait_for_new_checkpoint(path, timeout=0),
    "load": distckpt.load,
    "open": distckpt.open,
    "restore": lambda path: target().restore(path),
    "manager": Trainer,
}


COMMANDS = (
    *(("ls", "{0}"), ("show", "{0}"), ("verify", "{0}"), ("du", "{0}"), ("stats", "{0}"), ("groups", "{0}")),
    *(
        ("plot", "{0}", "-o", "{0}/../run.png"),
        ("report", "{0}", "-o", "{0}/../run.html"),
        ("cp", "{0}", "{0}/../copy"),
    ),
    *(("pin", "{0}"), ("pin", "{0}/{1}"), ("unpin", "{0}/{1}"), ("rm", "{0}/{1}"), ("tag", "{0}/{1}", "good")),
    ("untag", "{0}/good"),
)
"""What people say of a directory, {0}, and of a checkpoint in it."""


def assert_refused(directory: Path, *folders: str) -> None:
    """Whoever wants the newest, or to save here, is told which checkpoints there are and what to do; all is as it was."""
    before = files(directory)
    for name, read in READERS.items():
        with pytest.raises(LogMissingError) as caught:
            read(directory)
        told = str(caught.value)
        assert all(folder in told for folder in folders), name
        assert f"`distckpt adopt {directory}`" in told, name
        assert caught.value.folders == folders
    for command, *more in COMMANDS:
        result = cli(command, *(str(word).format(directory, folders[0]) for word in more))
        assert result.exit_code == 1, command
        assert f"`distckpt adopt {directory}`" in result.stderr, command
    assert files(directory) == before


def test_a_directory_whose_log_was_deleted_is_refused_by_all_and_left_as_it_is(lost: Path) -> None:
    assert_refused(lost, "ckpt-1", "ckpt-2", "ckpt-10")
    for number in (1, 2, 10):
        assert_loads(lost / f"ckpt-{number}", number)
    (lost / "ckpt-1" / "notes.txt").write_text("mine")
    (lost / names.LOG).mkdir()
    (lost / names.LOG / "README").write_text("mine")
    assert_refused(lost, "ckpt-1", "ckpt-2", "ckpt-10")


def test_a_log_of_which_no_entry_can_be_read_is_refused_and_what_the_error_says_helps(tmp_path: Path) -> None:
    run(tmp_path / "run", 1, 2)
    log = tmp_path / "run" / names.LOG
    entries = sorted(log.iterdir())
    for entry in entries:
        entry.write_bytes(b"garbage!")
    with pytest.raises(DamagedError) as caught:
        distckpt.open(tmp_path / "run")
    told = str(caught.value)
    assert told.startswith(f"{entries[-1]}: its 8 bytes do not end with a checksum")
    assert f"None of the {len(entries)} entries there can be read. Stop the job, move {log} away, and run" in told
    assert f"`distckpt adopt {tmp_path}/run`" in told
    log.rename(tmp_path / "away")
    assert cli("adopt", tmp_path / "run").exit_code == 0
    assert_loads(tmp_path / "run", 2)


def test_a_group_of_which_no_entry_can_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    distckpt.watch(tmp_path, group="eval", timeout=0).close()
    [entry] = (tmp_path / names.group_folder("eval")).iterdir()
    entry.write_bytes(b"garbage!")
    result = cli("groups", tmp_path)
    assert result.exit_code == 1
    assert f"The only entry there cannot be read. Stop the job, move {entry.parent} away, and whatever" in result.stderr
    assert "adopt" not in result.stderr


def test_many_ranks_are_refused_as_one_is(lost: Path) -> None:
    before = files(lost)
    with Gang(2) as gang:
        told = gang.run("ranks.directories:refused", directory=str(lost))
    assert [kind for kind, _ in told] == ["LogMissingError"] * 2
    assert all(f"`distckpt adopt {lost}`" in text for _, text in told)
    assert files(lost) == before


def test_what_never_was_a_checkpoint_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """Leftovers of an attempt without a manifest, and things of other people."""
    leftovers = [
        f"ckpt-3/{new_attempt()}/00000-0.arrow",
        f"ckpt-3/{new_attempt()}/index.arrow",
        "ckpt-5/data/manifest.json",
        f"models/{new_attempt()}/manifest.json",
        "checkpoint",
    ]
    for path in leftovers:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("left")
    assert distckpt.latest_checkpoint(tmp_path) is None
    assert list(distckpt.checkpoints_iterator(tmp_path, timeout=0)) == []
    with Trainer(tmp_path) as trainer:
        assert trainer.manager.restore_or_initialize() is None
        trainer.saved(1)
    assert_loads(tmp_path / "ckpt-1", 1)
    assert_sound_log(tmp_path)


def test_object_stores_are_told_alike() -> None:
    store = MemoryStore.named("log-missing-test")
    put_manifest(store, 3, new_attempt())
    with pytest.raises(LogMissingError, match="adopt memory://log-missing-test`"):
        distckpt.latest_checkpoint(store.url)
    with pytest.raises(LogMissingError):
        Trainer(store.url)
    assert sequence_numbers(store) == []


class ClaimedMeanwhile(LocalStore):
    """Somebody claims the directory and saves, just when it has been found to have no log."""

    def folders(self, folder: str) -> Iterator[str]:
        if folder == "" and not sequence_numbers(self):
            other = LocalStore(self.url)
            append_state(other, lambda state: state, kind="claim")
            put_manifest(other, 1, new_attempt())
        return super().folders(folder)


def test_a_first_save_that_begins_meanwhile_is_not_mistaken_for_a_lost_log(tmp_path: Path) -> None:
    from distckpt.directory.newest import newest_committed

    assert newest_committed(ClaimedMeanwhile(tmp_path)) is None
    assert list((tmp_path / "ckpt-1").glob("*/manifest.json")) != []


def test_managers_that_start_at_once_on_a_fresh_directory_are_not_refused(tmp_path: Path) -> None:
    """Each is served, or told that another has taken over."""
    for turn in range(5):
        directory, barrier = tmp_path / str(turn), threading.Barrier(3)

        def start_and_save(number: int, directory: Path = directory, barrier: threading.Barrier = barrier) -> str:
            barrier.wait(60)
            try:
                run(directory, number)
            except DistckptError as error:
                return type(error).__name__
            return "saved"

        with ThreadPoolExecutor(3) as pool:
            told = set(pool.map(start_and_save, range(3)))
        assert "saved" in told
        assert told <= {"saved", "FencedError", "StaleRunError"}
        assert_sound_log(directory)


def test_readers_follow_a_directory_from_before_its_first_save(tmp_path: Path) -> None:
    """However their looks fall between its claim, its manifest and its commit."""
    over = threading.Event()
    seen: list[str | None] = []
    errors: list[BaseException] = []

    def look(directory: Path) -> None:
        try:
            while not over.is_set():
                seen.append(distckpt.latest_checkpoint(directory))
        except BaseException as error:  # noqa: BLE001 - the test tells it
            errors.append(error)

    for turn in range(5):
        over.clear()
        reader = threading.Thread(target=look, args=(tmp_path / str(turn),))
        reader.start()
        run(tmp_path / str(turn), 1)
        over.set()
        reader.join()
    assert errors == []
    assert None in seen


# ---- the newest deleted by hand -----------------------------------------------------------------------------------------


@pytest.fixture
def shortened(tmp_path: Path) -> Path:
    """A run whose newest checkpoint was deleted with ``rm -r``."""
    run(tmp_path / "run", 7, 8, 9)
    shutil.rmtree(tmp_path / "run" / "ckpt-9")
    return tmp_path / "run"


def a_manager(path: Path) -> Any:
    with Trainer(path) as trainer:
        assert trainer.manager.latest_checkpoint == f"{path}/ckpt-8"
        assert trainer.manager.restore_or_initialize() == f"{path}/ckpt-8"
        assert holds(trainer.checkpoint.state, 8)
        return trainer.manager.restore()


FALLS_BACK: dict[str, Callable[[Path], Any]] = {
    "latest_checkpoint": distckpt.latest_checkpoint,
    "checkpoints_iterator": lambda path: next(distckpt.checkpoints_iterator(path, timeout=0)),
    "wait_for_new_checkpoint": lambda path: distckpt.wait_for_new_checkpoint(path, timeout=0),
    "open": lambda path: distckpt.open(path).path,
    "load": lambda path: f"{path}/ckpt-{distckpt.load(path)['state']['nested']['step']}",
    "restore": lambda path: target().restore(path).path,
    "manager": a_manager,
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_a_newest_that_was_deleted_by_hand_is_passed_over_and_told(
    shortened: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    assert FALLS_BACK[name](shortened) == f"{shortened}/ckpt-8"
    told = [record for record in caplog.records if f"{shortened}/ckpt-9" in record.getMessage()]
    assert told != []
    assert {record.levelno for record in told} == {logging.WARNING}


def test_an_iterator_goes_on_from_what_is_left(shortened: Path) -> None:
    checkpoints = distckpt.checkpoints_iterator(shortened, timeout=0)
    assert next(checkpoints) == f"{shortened}/ckpt-8"
    run(shortened, 10)
    assert list(checkpoints) == [f"{shortened}/ckpt-10"]


def test_the_command_line_shows_what_is_missing(shortened: Path) -> None:
    listed = json.loads(cli("ls", "--json", shortened).stdout)["checkpoints"]
    assert {one["checkpoint"]: one["state"] for one in listed} == {
        "ckpt-7": ["active"],
        "ckpt-8": ["newest"],
        "ckpt-9": ["missing"],
    }
    lines = [line.split()[:2] for line in cli("ls", shortened).stdout.splitlines()]
    assert ["ckpt-9", "missing"] in lines
    assert cli("show", shortened).stdout.replace("\n", "").startswith(f"{shortened}/ckpt-8saved")
    verified = cli("verify", shortened)
    assert verified.exit_code == 1
    assert "ckpt-9  DAMAGED" in verified.stdout
    assert "ckpt-8  good" in verified.stdout


def test_several_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "ckpt-3")
    shutil.rmtree(tmp_path / "ckpt-2")
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-1"
    [record] = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}/ckpt-3, {tmp_path}/ckpt-2: ")


def test_when_all_are_missing_nothing_is_made_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit_bare(tmp_path, 1)
    shutil.rmtree(tmp_path / "ckpt-1")
    assert distckpt.latest_checkpoint(tmp_path) is None
    assert f"{tmp_path}/ckpt-1" in caplog.text
    with pytest.raises(DamagedError, match="missing"):
        distckpt.open(tmp_path)


def test_a_run_goes_on_after_its_newest_was_deleted(shortened: Path) -> None:
    with Trainer(shortened, max_to_keep=2) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{shortened}/ckpt-8"
        trainer.saved(9)
        trainer.saved(10)
    assert numbers(shortened) == [9, 10]
    assert_loads(shortened / "ckpt-9", 9)
    assert_loads(open_store(shortened).url, 10)
