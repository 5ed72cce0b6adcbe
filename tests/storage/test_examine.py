"""``distckpt doctor``: in plain words whether a place is safe and how fast it is; nothing stays of what was tried."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from distckpt.cli import main
from distckpt.storage import LocalStore, MemoryStore, ObjectInfo, Source, Store, examine, location
from distckpt.testing.faults import Call, Fault, Operation
from distckpt.testing.faulty import FaultyStore
from distckpt.testing.observing import everything


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "MOST_BYTES", examine.FIRST_BYTES)
    monkeypatch.setattr(examine, "ROUNDS", 3)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store], str]:
    """Gives a store a URL, below which all is in it."""

    def mount(store: Store) -> str:
        monkeypatch.setitem(location._OPENERS, "odd", lambda url, options: store)
        return "odd://place/run"

    return mount


def call(url: str | Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["doctor", str(url), *options])


def verdicts(result: Result) -> dict[str, str]:
    return {one["what"].partition(",")[0]: one["verdict"] for one in json.loads(result.stdout)["findings"]}


def test_a_folder_that_does_not_exist_yet_is_safe_and_is_not_there_afterwards(tmp_path: Path) -> None:
    url = tmp_path / "not" / "yet" / "there"
    result = call(url, "--json", "--gigabytes", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["url"], found["is_safe"]) == (str(url), True)
    assert set(verdicts(result).values()) <= {"good", "careful"}
    assert {"file system", "room", "flush", "clock", "latency", "throughput"} <= verdicts(result).keys()
    speed = found["speed"]
    assert found["save_seconds"] == pytest.approx(2e9 / speed["up"] + 3 * speed["create"])
    assert list(tmp_path.iterdir()) == []


def test_it_says_so_in_plain_words_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "ckpt-1").mkdir()
    result = call(tmp_path)
    assert result.exit_code == 0
    assert "Checkpoints are safe at" in result.stdout
    assert "A save of 10 GB from this host alone takes about" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-1"]


@dataclass(frozen=True)
class Always:
    """Every call of one operation goes wrong."""

    operation: Operation
    kind: Fault

    def fault(self, call: Call) -> Fault | None:
        return self.kind if call.operation == self.operation else None


class Overwriting(MemoryStore):
    """Whoever creates an object has won."""

    def put_if_absent(self, path: str, data: bytes) -> None:
        """See Store."""
        self.replace(path, data)


class Late(MemoryStore):
    """Has a clock of its own."""

    def stat(self, path: str) -> ObjectInfo | None:
        """See Store."""
        info = super().stat(path)
        return info and replace(info, modified=info.modified - 3000)


class Mangling(MemoryStore):
    """Gives other bytes than it was given."""

    def open(self, path: str) -> Source:
        """See Store."""
        self.replace("other", bytes(len(self.objects[path].data)))
        return super().open("other")


class Interrupted(MemoryStore):
    """Somebody presses Ctrl-C while a large object is written."""

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        super().put_unique(path, size, sections)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("store", "status", "what", "verdict"),
    [
        (Overwriting(), 1, "exclusive create", "bad"),
        (Mangling(), 1, "ranges and checksums", "bad"),
        (Late(), 0, "clock", "careful"),
        (FaultyStore(MemoryStore(), Always("put_if_absent", Fault.BEFORE)), 2, "writing", "untried"),
        (FaultyStore(MemoryStore(), Always("put_unique", Fault.FULL)), 0, "throughput", "careful"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    at: Callable[[Store], str], store: Store, status: int, what: str, verdict: str
) -> None:
    result = call(at(store), "--json")
    assert (result.exit_code, verdicts(result)[what]) == (status, verdict), result.output
    [finding] = [one for one in json.loads(result.stdout)["findings"] if one["what"].startswith(what)]
    assert finding["advice"]
    shown = call(at(store)).stdout
    assert ("NOT be safe" in shown, "could not be tried" in shown) == (status == 1, status == 2)
    inner: Any = store.inner if isinstance(store, FaultyStore) else store
    assert everything(inner).keys() <= {"other"}


def test_an_interrupted_doctor_leaves_nothing(at: Callable[[Store], str]) -> None:
    store = Interrupted()
    with contextlib.suppress(KeyboardInterrupt):
        call(at(store))
    assert everything(store) == {}


def test_a_file_system_without_hard_links_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    result = call(tmp_path)
    assert result.exit_code == 1
    assert "hard links" in result.stdout.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "status"), [("nosuch://bucket/run", 2), ("", 2), ("/proc/nowhere", 2)])
def test_what_cannot_be_tried_is_status_2(url: str, status: int) -> None:
    assert call(url).exit_code == status


def test_an_option_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    assert call(tmp_path, "-o", "token=anon").exit_code == 2
    assert LocalStore(tmp_path).url == str(tmp_path)
