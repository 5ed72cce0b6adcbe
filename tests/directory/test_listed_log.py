"""A listing has no checksum: one that cannot be of a log is made once more before anything is believed of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.directory.log import append, read_tail, sequence_numbers
from distckpt.format import names
from distckpt.format.json.log import Entry, State
from distckpt.storage import LocalStore, ObjectInfo


class Garbled(LocalStore):
    """The first listing has another name in place of the last entry's; None leaves it out."""

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(root)
        self.name = name
        self.listed = 0

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """What is there, from the second time on."""
        found = sorted(super().list(folder), key=lambda info: info.path)
        if self.listed == 0:
            found[-1] = dataclasses.replace(found[-1], path=f"{names.LOG}/{self.name}")
        self.listed += 1
        return iter(found)


def entry(seq: int) -> Entry:
    return Entry(1, seq, 1, "pin", 1.0, f"{seq:032x}", State(run=1))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seq in (1, 2, 3):
        assert append(LocalStore(tmp_path), entry(seq)).outcome == "appended"
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "00000000000000000002.json",
        "00000000000000000013.json",
        "0000000000000000000s.json",
        "00000000000000000003.jsoo",
    ],
)
def test_a_number_that_a_listing_garbles_is_listed_again(root: Path, name: str) -> None:
    store = Garbled(root, name)
    assert sequence_numbers(store) == [1, 2, 3]
    assert read_tail(Garbled(root, name)).seq == 3


def test_nobody_is_told_of_a_newer_entry_that_is_not_there(root: Path) -> None:
    result = append(Garbled(root, "00000000000000000007.json"), entry(4))
    assert (result.outcome, result.newest) == ("appended", 4)


def test_what_is_so_a_second_time_is_believed(root: Path) -> None:
    (root / names.entry_path(2)).unlink()
    (root / names.LOG / "notes.txt").touch()
    assert sequence_numbers(LocalStore(root)) == [1, 3]


def test_a_log_in_order_is_listed_once(root: Path) -> None:
    store = Garbled(root, "00000000000000000003.json")
    assert sequence_numbers(store) == [1, 2, 3]
    assert store.listed == 1
