"""The ``checkpoint`` file as the log has it: current when a manager was waited for, and nobody else's is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import distckpt
from distckpt.storage import LocalStore
from distckpt.testing.faults import Call, Fault
from distckpt.testing.faulty import FaultyStore
from tests.support.small_runs import Trainer, mount, mounting, run, settled

TENSORFLOWS = b'model_checkpoint_path: "ckpt-2"\nall_model_checkpoint_paths: "ckpt-2"\n'


@pytest.fixture(autouse=True)
def stores() -> Iterator[None]:
    with mounting():
        yield


def paths(directory: Path) -> list[str]:
    """What the state file lists."""
    state = distckpt.get_checkpoint_state(directory)
    return [] if state is None else [path.rpartition("/")[2] for path in state.all_model_checkpoint_paths]


def kept(directory: Path) -> list[bytes]:
    """State files of others that were kept."""
    return [path.read_bytes() for path in sorted(directory.glob("checkpoint.*"))]


# ---- when it is current -------------------------------------------------------------------------------------------


class Gated(LocalStore):
    """Replaces the state file only while its gate is open."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()

    def replace(self, path: str, data: bytes) -> None:
        """See Store."""
        assert path != "checkpoint" or self.gate.wait(60)
        super().replace(path, data)


@pytest.mark.parametrize("wait", ["wait", "sync", "close"])
def test_whoever_has_waited_for_a_manager_finds_what_it_committed_in_the_state_file(tmp_path: Path, wait: str) -> None:
    store = Gated(tmp_path)
    with Trainer(mount(store)) as trainer, ThreadPoolExecutor(1) as elsewhere:
        assert trainer.saved(1)  # a commit does not wait for the file
        assert not (tmp_path / "checkpoint").exists()
        waits = elsewhere.submit(lambda: (getattr(trainer.manager, wait)(), paths(tmp_path)))
        assert trainer.save(2).result(30) if wait != "close" else True
        store.gate.set()
        assert waits.result(30)[1][0] == "ckpt-1"
    assert paths(tmp_path) == (["ckpt-1", "ckpt-2"] if wait != "close" else ["ckpt-1"])


class NothingReplaced:
    """A script by which no file can be replaced."""

    def fault(self, call: Call) -> Fault | None:
        """See Script."""
        return Fault.BEFORE if call.operation == "replace" else None


def test_a_state_file_that_cannot_be_written_holds_up_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FaultyStore(LocalStore(tmp_path), NothingReplaced())
    with Trainer(mount(store)) as trainer:
        for number in (1, 2):
            trainer.saved(number)
            trainer.manager.wait()
        assert paths(tmp_path) == []
        assert "Publish" in caplog.text
        store.heal()
        trainer.saved(3)
        trainer.manager.wait()
        assert paths(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-3"]


# ---- whose it is --------------------------------------------------------------------------------------------------


def test_tensorflows_own_state_file_is_kept_under_another_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint").write_bytes(TENSORFLOWS)
    (tmp_path / "ckpt-2.index").write_bytes(b"TensorFlow's")
    with Trainer(tmp_path) as trainer:
        assert (tmp_path / "checkpoint").read_bytes() == TENSORFLOWS  # until there is something to say
        trainer.saved(1)
    assert paths(tmp_path) == ["ckpt-1"]
    [file] = tmp_path.glob("checkpoint.*")
    assert file.read_bytes() == TENSORFLOWS
    assert f"it is kept as {file}" in caplog.text
    assert repr(file.name) in caplog.text
    state = distckpt.get_checkpoint_state(tmp_path, file.name)
    assert state is not None
    assert state.model_checkpoint_path == f"{tmp_path}/ckpt-2"
    run(tmp_path, 2, 3)
    assert kept(tmp_path) == [TENSORFLOWS]
    assert caplog.text.count("it is kept as") == 1
    assert (tmp_path / "ckpt-2.index").read_bytes() == b"TensorFlow's"


def test_a_state_file_that_somebody_writes_during_a_run_is_kept_too(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.saved(1)
        trainer.manager.wait()
        distckpt.update_checkpoint_state(tmp_path, "mine")
        mine = (tmp_path / "checkpoint").read_bytes()
        trainer.saved(2)
        trainer.manager.wait()
        (tmp_path / "checkpoint").write_bytes(b"not a state at all")
        trainer.saved(3)
    assert sorted(kept(tmp_path)) == sorted([mine, b"not a state at all"])
    assert paths(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-3"]


def test_what_was_written_here_is_replaced_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By another coordinator, and by one that died before it could write what it had committed last."""
    with Trainer(tmp_path, max_to_keep=2) as trainer:
        trainer.saved(1)
        trainer.manager.wait()
        early = (tmp_path / "checkpoint").read_bytes()
        trainer.saved(2)
        trainer.saved(3)
    settled(tmp_path)
    (tmp_path / "checkpoint").write_bytes(early)
    run(tmp_path, 4, 5, max_to_keep=2)
    assert paths(tmp_path) == ["ckpt-4", "ckpt-5"]
    (tmp_path / "checkpoint").write_bytes(b"")
    run(tmp_path, 6, max_to_keep=2)
    assert paths(tmp_path) == ["ckpt-5", "ckpt-6"]
    assert kept(tmp_path) == []
    assert "it is kept" not in caplog.text


def test_a_link_in_its_place_is_neither_followed_nor_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(TENSORFLOWS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(elsewhere)
    run(tmp_path / "run", 1, 2)
    assert (tmp_path / "run" / "checkpoint").is_symlink()
    assert elsewhere.read_bytes() == TENSORFLOWS
    assert "Publish" in caplog.text
    assert distckpt.latest_checkpoint(tmp_path / "run") == f"{tmp_path}/run/ckpt-2"


def test_a_file_too_long_to_be_a_state_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "checkpoint").open("wb") as file:
        file.truncate((64 << 20) + 1)
    run(tmp_path, 1)
    assert (tmp_path / "checkpoint").stat().st_size == (64 << 20) + 1
    assert "Publish" in caplog.text
