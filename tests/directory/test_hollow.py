"""Files that are large in name only, and large ones that are damaged: they take little memory, whatever they claim."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crc32c
import pytest

import distckpt
from distckpt.directory.log import read_tail
from distckpt.errors import DamagedError
from distckpt.format import names
from distckpt.storage import LocalStore
from tests.support.checkpoints import write_checkpoint
from tests.support.forging import forge_index, manifest_of, size_and_crc, vouch

MIB = 1 << 20
HUGE = 512 * MIB


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint copied alone."""
    tree = {"weights": [1.5], "text": "a value of its own"}
    written = Path(write_checkpoint(tmp_path / "run", 1, {"state": tree}))
    return Path(shutil.move(written, tmp_path / "ckpt-1"))


@contextmanager
def little_memory(most: int = 128 * MIB) -> Iterator[None]:
    """Inside, no more than so many bytes are held at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most


def grow(file: Path, size: int = HUGE) -> None:
    """Make a file so large without a byte on the disk."""
    os.truncate(file, size)
    assert file.stat().st_blocks * 512 < MIB


READERS: dict[str, Callable[[Path], Any]] = {
    "load": distckpt.load,
    "restore": lambda path: distckpt.Checkpoint(state={"weights": [0.0], "text": ""}).restore(path),
}


@pytest.mark.parametrize("read", READERS)
def test_an_index_without_a_byte_on_the_disk(copy: Path, read: str) -> None:
    index = manifest_of(copy)[0].with_name(names.INDEX)
    index.write_bytes(b"")
    grow(index)
    vouch(copy)
    with little_memory(), pytest.raises(DamagedError, match=r"index.arrow: .*hardly any"):
        READERS[read](copy)


def test_a_large_index_is_checked_before_there_is_memory_for_it(copy: Path) -> None:
    index = manifest_of(copy)[0].with_name(names.INDEX)
    index.write_bytes(b"x" * (80 * MIB))
    vouch(copy)
    with index.open("r+b") as file:
        file.write(b"y")
    with little_memory(), pytest.raises(DamagedError, match=r"index.arrow: .*CRC32C"):
        distckpt.load(copy)


def test_a_manifest_without_a_byte_on_the_disk(copy: Path) -> None:
    grow(manifest_of(copy)[0], 64 * MIB)
    with little_memory(), pytest.raises(DamagedError, match=r"manifest.json: .*hardly any"):
        distckpt.load(copy)


def test_log_entries_without_a_byte_on_the_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"state": 1})
    for seq in range(2, 20):
        file = tmp_path / names.entry_path(seq)
        file.write_bytes(b"")
        grow(file, 64 * MIB)
    with little_memory():
        tail = read_tail(LocalStore(tmp_path))
    assert (tail.seq, tail.entry.seq if tail.entry else 0, len(tail.damaged)) == (19, 1, 18)


def test_damaged_log_entries_are_held_one_at_a_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"state": 1})
    for seq in range(2, 12):
        (tmp_path / names.entry_path(seq)).write_bytes(b"x" * (16 * MIB))
    with little_memory(64 * MIB):
        tail = read_tail(LocalStore(tmp_path))
    assert (tail.entry.seq if tail.entry else 0, len(tail.damaged)) == (1, 10)


def test_a_value_without_a_byte_on_the_disk(copy: Path) -> None:
    shard = manifest_of(copy)[0].with_name("00000-0.arrow")
    position = shard.stat().st_size
    grow(shard)
    zeros = size_and_crc(shard)[0] - position

    def move(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row["key"] == "state.text")
        crc = 0
        for _ in range(0, zeros, MIB):
            crc = crc32c.crc32c(bytes(min(MIB, zeros - _)), crc)
        row.update(position=position, size=zeros, block=zeros, blocks=[crc], crc32c=crc)

    forge_index(copy, move)
    vouch(copy)
    with little_memory(), pytest.raises(DamagedError, match="zero bytes") as caught:
        distckpt.load(copy)
    assert caught.value.key == "state.text"


def test_verifying_a_shard_without_a_byte_on_the_disk(copy: Path) -> None:
    grow(manifest_of(copy)[0].with_name("00000-0.arrow"), 256 * MIB)
    vouch(copy)
    before = resident()
    with distckpt.open(copy) as reader:
        report = reader.verify()
    assert not report.good
    assert resident() - before < 64 * MIB


def resident() -> int:
    """The most memory that this process has had at any time, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_a_file_with_holes_is_read_if_it_is_not_all_holes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    file = tmp_path / "holey"
    with file.open("wb") as content:
        for begin in range(0, 64 * MIB, 4 * MIB):
            content.seek(begin)
            content.write(b"x" * MIB)
    data = store.read("holey", 64 * MIB)
    assert data == (b"x" * MIB + bytes(3 * MIB)) * 15 + b"x" * MIB
