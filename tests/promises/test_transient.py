"""Every read that a reader or a restore makes fails once, or gives other bytes once: nothing comes of it."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import distckpt
from distckpt.coordinator.shell.sealing import read_log_tail
from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.storage import LocalStore, Source, Store, patience
from distckpt.testing.faulty import Call, Fault, FaultyStore
from tests.support.small_runs import Trainer, holds, mount, mounting, run, target

READ_OPERATIONS = ("read", "open", "read_into", "stat", "list", "folders")


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(patience, "PAUSES", (0.0, 0.001, 0.001))
    with mounting():
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ckpt-1 and ckpt-2, of which the second is the newest."""
    directory = tmp_path_factory.mktemp("template")
    run(directory, 1, 2)
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def restored_by_manager(url: str) -> int:
    with Trainer(url) as trainer:
        path = trainer.manager.restore_or_initialize()
        assert path is not None
        number = int(path.rpartition("-")[2])
        assert holds(trainer.checkpoint.state, number)
        return number


def restored(url: str) -> int:
    checkpoint = target()
    path = checkpoint.restore(url).path
    number = int(path.rpartition("-")[2])
    assert holds(checkpoint.state, number)
    return number


def verified(url: str) -> int:
    with distckpt.open(url) as reader:
        assert reader.verify().damages == ()
        return reader.manifest.number


READERS: dict[str, Callable[[str], int]] = {
    "manager": restored_by_manager,
    "restore": restored,
    "load": lambda url: int(distckpt.load(url)["state"]["nested"]["step"]),
    "verify": verified,
    "latest_checkpoint": lambda url: int(str(distckpt.latest_checkpoint(url)).rpartition("-")[2]),
    "checkpoints_iterator": lambda url: int(next(distckpt.checkpoints_iterator(url, timeout=0)).rpartition("-")[2]),
    "recovery": lambda url: _newest(read_log_tail(_opened(url))),
}


def _newest(tail: Any) -> int:
    return int(tail.entry.state.newest().number)


def _opened(url: str) -> Store:
    from distckpt.storage import open_store

    return open_store(url)


# ---- no answer --------------------------------------------------------------------------------------------------------


@dataclass
class NthRead:
    """The read with that number gets no answer."""

    number: int
    passed: int = 0
    struck: str = ""

    def fault(self, call: Call) -> Fault | None:
        """A fault, if it is that one."""
        if call.operation not in READ_OPERATIONS:
            return None
        self.passed += 1
        if self.passed - 1 != self.number:
            return None
        self.struck = f"{call.operation} {call.path}"
        return Fault.BEFORE


@pytest.mark.parametrize("reader", READERS)
def test_whatever_read_fails_the_newest_is_read(template: Path, tmp_path: Path, reader: str) -> None:
    for number in itertools.count():
        directory = shutil.copytree(template, tmp_path / str(number)) if reader == "manager" else template
        script = NthRead(number)
        assert READERS[reader](mount(FaultyStore(LocalStore(directory), script))) == 2, script.struck
        if not script.struck:
            break
    assert number > 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", [names.MANIFEST, names.INDEX, "00000-0.arrow", names.LOG])
def test_a_file_that_cannot_be_opened_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    system, failed = os.open, []

    def opening(path: str, *rest: Any, **more: Any) -> int:
        if path == name and not failed:
            failed.append(path)
            raise OSError(number, os.strerror(number))
        return system(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", opening)
        assert restored_by_manager(str(directory)) == 2
    assert failed == [name]


# ---- other bytes ------------------------------------------------------------------------------------------------------


@dataclass
class Misread:
    """Spoils the reading with that number: by a flipped bit, or by ending too early."""

    number: int
    short: bool
    passed: int = 0
    struck: str = ""
    places: list[str] = field(default_factory=list)

    def due(self, path: str) -> bool:
        """Whether this reading is the one."""
        self.passed += 1
        if self.passed - 1 == self.number:
            self.struck = path
        return self.passed - 1 == self.number


class Misreading(LocalStore):
    """A local store one of whose readings is not what is on the disk."""

    def __init__(self, root: Path, misread: Misread) -> None:
        super().__init__(root)
        self.misread = misread

    def read(self, path: str, max_bytes: int) -> bytes:
        """The content, or something else."""
        data = bytearray(super().read(path, max_bytes))
        if data and self.misread.due(path):
            if self.misread.short:
                return bytes(data[: len(data) // 2])
            data[len(data) // 2] ^= 1
        return bytes(data)

    def open(self, path: str) -> Source:
        """A source whose readings may be something else."""
        return MisreadSource(path, super().open(path), self.misread)


class MisreadSource:
    def __init__(self, path: str, inner: Source, misread: Misread) -> None:
        self.path = path
        self.inner = inner
        self.misread = misread

    @property
    def size(self) -> int:
        return self.inner.size

    def read_into(self, position: int, target: memoryview) -> None:
        self.inner.read_into(position, target)
        if target.nbytes and self.misread.due(self.path):
            if self.misread.short:
                raise DamagedError(self.path, "ends too early")
            target.cast("B")[target.nbytes // 2] ^= 1

    def close(self) -> None:
        self.inner.close()


@pytest.mark.wide(2)
@pytest.mark.parametrize("short", [False, True], ids=["flipped", "short"])
@pytest.mark.parametrize("reader", READERS)
def test_whatever_is_misread_once_the_newest_is_read(template: Path, tmp_path: Path, reader: str, short: bool) -> None:
    for number in itertools.count():
        directory = Path(shutil.copytree(template, tmp_path / str(number))) if reader == "manager" else template
        misread = Misread(number, short)
        assert READERS[reader](mount(Misreading(directory, misread))) == 2, misread.struck
        if not misread.struck:
            break
    assert number > 0
