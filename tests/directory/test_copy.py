"""``distckpt cp``: whole checkpoints arrive, each committed by the log there, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli import main
from distckpt.directory.copy import Copied, Copying, origin
from distckpt.directory.exports import read_export
from distckpt.directory.leases import Leases
from distckpt.directory.log import read_tail
from distckpt.errors import CoordinatorError, FencedError, StorageError
from distckpt.format import names
from distckpt.format.json.export import FORMAT, ExportedFile, ExportedModule, ExportManifest
from distckpt.format.json.sealed import seal
from distckpt.storage import LocalStore, ObjectInfo, Store
from distckpt.testing.faults import Call, Fault
from distckpt.testing.faulty import FaultyStore
from tests.support.damage import flip
from tests.support.small_runs import (
    Trainer,
    assert_loads,
    assert_sound_log,
    attempt_folder,
    files,
    numbers,
    on_disk,
    records,
    run,
    settled,
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fates(*arguments: str | Path, status: int = 0) -> list[tuple[str, str]]:
    result = call("cp", *arguments, "--json")
    assert result.exit_code == status, result.output
    return [(one["checkpoint"], one["fate"]) for one in json.loads(result.stdout)["checkpoints"]]


def copied(source: Path | Store, target: Store) -> list[Copied]:
    """As the command does it, to a store that may fail."""
    wanted = origin(source) if isinstance(source, Path) else origin(source.url)
    with contextlib.closing(Copying(wanted, target, read_tail(target), lambda: 1.0)) as copying:
        return [copying.copy(one) for one in wanted.wanted]


def checkpoints(directory: Path) -> dict[str, bytes]:
    return {path: data for path, data in files(directory).items() if path.startswith("ckpt-")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    run(tmp_path / "source", 1, 2, 3)
    settled(tmp_path / "source")
    return tmp_path / "source"


def test_a_run_is_copied_byte_for_byte_and_the_job_goes_on_there(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    assert fates(source, there) == [("ckpt-1", "copied"), ("ckpt-2", "copied"), ("ckpt-3", "copied")]
    assert checkpoints(there) == checkpoints(source)
    assert records(there) == records(source)
    assert not (source / names.LEASES).exists()
    with Trainer(there, max_to_keep=2) as trainer:
        assert trainer.manager.restore_or_initialize() == f"{there}/ckpt-3"
        trainer.saved(4)
    assert numbers(there) == [3, 4]
    assert_loads(there / "ckpt-3", 3)


def test_what_was_reported_goes_along_though_no_entry_has_it_yet(source: Path, tmp_path: Path) -> None:
    with distckpt.open(source) as reader:
        reader.report({"loss": 1.5})
    fates(source, tmp_path / "there")
    fates(source / "ckpt-3", tmp_path / "alone")
    for there in ("there", "alone"):
        assert records(tmp_path / there)[-1].metrics == {"loss": 1.5}


def test_what_came_since_follows_and_nothing_is_copied_twice(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    assert fates(source, there, "--newest") == [("ckpt-3", "copied")]
    with Trainer(source) as trainer:
        trainer.saved(4)
    assert fates(source, there, "--since", "2") == [
        ("ckpt-2", "copied"),
        ("ckpt-3", "there already"),
        ("ckpt-4", "copied"),
    ]
    assert numbers(there) == [2, 3, 4]
    assert distckpt.latest_checkpoint(there) == f"{there}/ckpt-4"
    assert "0 checkpoints copied" in call("cp", source / "ckpt-4", there).stdout
    assert fates(source, there, "--since", "2020-02-02T20:20")[0] == ("ckpt-1", "copied")
    assert call("cp", source, there, "--since", "2222-02-22").exit_code == 2
    assert call("cp", source, there, "--since", "yesterday").exit_code == 2


def test_a_lone_copy_becomes_a_directory_again(source: Path, tmp_path: Path) -> None:
    alone, there = tmp_path / "backup" / "ckpt-2", tmp_path / "there"
    shutil.copytree(source / "ckpt-2", alone)
    assert fates(alone, there) == [("ckpt-2", "copied")]
    assert_loads(there / "ckpt-2", 2)
    assert on_disk(there) == [2]


@dataclass
class GoneAt:
    """Everything fails from the write with that number on, half of it done, as when the process is killed there."""

    write: int

    def fault(self, call: Call) -> Fault | None:
        self.write -= call.operation in ("put_if_absent", "put_unique", "replace", "delete")
        torn = call.operation == "put_unique"
        return None if self.write >= 0 else Fault.TORN if torn and self.write == -1 else Fault.GONE


def test_killed_at_any_write_the_next_copy_goes_on(source: Path, tmp_path: Path) -> None:
    wanted, found = source / "ckpt-2", 0
    for write in range(100):
        there = tmp_path / f"there-{write}"
        store = FaultyStore(LocalStore(there), GoneAt(write))
        with contextlib.suppress(StorageError, CoordinatorError):
            copied(wanted, store)
        if call("show", there / "ckpt-2").exit_code == 0:  # it is in the log, or lacks nothing but that
            assert_loads(there / "ckpt-2", 2)
        [again] = copied(wanted, LocalStore(there))
        found += again.found
        assert again.fate in ("copied", "there already")
        assert_loads(there / "ckpt-2", 2)
        assert_sound_log(there)
        if not store.calls[-1].fault:
            break
    assert found > 0, "what had landed was copied again"
    assert 5 < write < 99


@pytest.mark.parametrize("what", ["00000-0.arrow", "index.arrow", "manifest.json"])
def test_what_is_damaged_is_left_out_and_the_rest_arrives(source: Path, tmp_path: Path, what: str) -> None:
    there = tmp_path / "there"
    flip(attempt_folder(source, 2) / what, 100)
    assert fates(source, there, status=1) == [("ckpt-1", "copied"), ("ckpt-2", "damaged"), ("ckpt-3", "copied")]
    assert (numbers(there), on_disk(there)) == ([1, 3], [1, 3])


def test_other_bytes_under_the_same_name_are_written_anew(source: Path, tmp_path: Path) -> None:
    """Of the right length, as a file system may leave them after a power loss."""
    there = tmp_path / "there"
    folder = attempt_folder(source, 1).relative_to(source)
    shutil.copytree(source / folder, there / folder)
    flip(there / folder / "00000-0.arrow", 300)
    [first, *_] = copied(source, LocalStore(there))
    assert 0 < first.found < first.nbytes
    assert_loads(there / "ckpt-1", 1)


def test_what_is_copied_is_leased_until_it_has_arrived(source: Path, tmp_path: Path) -> None:
    leased = []

    class Watching(LocalStore):
        def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
            leased.append((path.split("/")[1], Leases(LocalStore(source)).read().attempts))
            return super().put_unique(path, size, sections)

    copied(source, Watching(tmp_path / "there"))
    assert len(leased) == 6
    assert all(attempts == {attempt} for attempt, attempts in leased)


def test_what_retired_before_its_turn_is_left_out(source: Path, tmp_path: Path) -> None:
    target = LocalStore(tmp_path / "there")
    wanted = origin(source)
    assert call("rm", source / "ckpt-1", "--force", "-y").exit_code == 0
    with contextlib.closing(Copying(wanted, target, read_tail(target), lambda: 1.0)) as copying:
        found = [copying.copy(one).fate for one in wanted.wanted]
    assert found == ["vanished", "copied", "copied"]
    assert on_disk(tmp_path / "there") == [2, 3]


def test_a_source_that_cannot_be_written_to_needs_no_lease(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace = LocalStore.replace

    def refuse(self: LocalStore, path: str, data: bytes) -> None:
        if path.startswith(names.LEASES):
            raise StorageError(path, "read-only")
        replace(self, path, data)

    monkeypatch.setattr(LocalStore, "replace", refuse)
    assert fates(source, tmp_path / "there", "--newest") == [("ckpt-3", "copied")]
    assert "no lease could be written" in caplog.text


def test_beside_a_jobs_own_checkpoints_copies_are_preserved_and_its_newest_stays(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    trainer = Trainer(there)
    trainer.saved(3)
    trainer.saved(7)
    assert "--force" in call("cp", source, there).stderr
    assert fates(source, there, "--force") == [("ckpt-1", "copied"), ("ckpt-2", "copied"), ("ckpt-3", "passed over")]
    state = read_tail(LocalStore(there)).state
    assert ([one.number for one in state.active], [one.number for one in state.preserved]) == ([3, 7], [1, 2])
    assert distckpt.latest_checkpoint(there) == f"{there}/ckpt-7"
    with pytest.raises(FencedError):
        trainer.saved(8)
    trainer.manager.close()


def test_beside_checkpoints_without_a_log_nothing_is_claimed(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(source / "ckpt-1", there / "ckpt-1")
    result = call("cp", source, there, "--newest")
    assert (result.exit_code, "distckpt adopt" in result.stderr) == (1, True)
    assert on_disk(there) == [1]
    assert fates(source, there) == [("ckpt-1", "copied"), ("ckpt-2", "copied"), ("ckpt-3", "copied")]


def test_exports_go_along_also_those_made_later(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    export(source, 1)
    assert fates(source, there)[0] == ("ckpt-1", "copied")
    assert checkpoints(there) == checkpoints(source)
    export(source, 2)
    assert fates(source, there)[1] == ("ckpt-2", "there already")
    assert checkpoints(there) == checkpoints(source)
    assert [one["good"] for one in json.loads(call("verify", there, "--json").stdout)] == [True] * 3
    export(source, 3)
    flip(next(attempt_folder(source, 3).glob("export-*/*/*")), 3)
    assert fates(source, there, status=1)[2] == ("ckpt-3", "damaged")
    assert numbers(there) == [1, 2, 3]
    assert read_export(LocalStore(there), attempt_folder(there, 3).relative_to(there).as_posix()) is None


def export(directory: Path, number: int) -> None:
    """As an exporter leaves it."""
    store, data = LocalStore(directory), b"weights" * number
    folder = attempt_folder(directory, number).relative_to(directory).as_posix()
    module = ExportedModule("encoder", (ExportedFile(names.WEIGHTS, len(data), crc32c.crc32c(data)),))
    manifest = ExportManifest(FORMAT, f"{number:032x}", folder.rpartition("/")[2], 1.0, (module,))
    for path, _ in manifest.files():
        store.put_unique(f"{folder}/{path}", len(data), [memoryview(data)])
    store.put_if_absent(f"{folder}/{names.EXPORT}", seal(manifest))


@pytest.mark.parametrize(
    ("source_of", "target_of", "reason"),
    [
        (lambda source: source, lambda source: source, "source and destination"),
        (lambda source: source.parent / "nowhere", lambda source: source.parent / "there", "nowhere"),
    ],
)
def test_nothing_to_do_is_one_sentence(
    source: Path, source_of: Callable[[Path], Any], target_of: Callable[[Path], Any], reason: str
) -> None:
    result = call("cp", source_of(source), target_of(source), "--force")
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not (source.parent / "there").exists()
