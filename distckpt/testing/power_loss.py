"""What a power loss may leave of a folder, made of a record of what was done to it.

The disk is one on which only what was synced is sure, which is what POSIX says and less than most file systems do:

- A file's bytes are there once the file was synced. A write that was not may be there, missing, there up to some
  sector, or the file may have grown without it and have zeros in its place; each of several writes by itself.
- A name is there, or gone, once its folder was synced. Whatever was done to names since then may have happened or not,
  in any combination, but what was done to one name happens in order, and a rename happens whole.

So a program whose promises hold in every state that ``after_power_loss`` can make does not depend on the order in which
a kernel or a disk happens to write::

    disk = Disk()
    for event in read_record("record"):
        disk.apply(event)
        write_tree(disk.after_power_loss(Drawn(random.Random(7))), folder)   # and look at what is in the folder
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from distckpt.testing.system_calls import KINDS

SECTOR = 512
"""A disk writes this many bytes whole or not at all."""

Tree: TypeAlias = "dict[str, bytes | Tree]"
"""The content of a folder: files as their bytes, folders as what is in them."""


# ---- the record -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was done: one of the ``KINDS`` of system calls, "root", which comes first, or "mark".

    ``name`` in ``folder`` got ``inode``, or lost its own; ``other_name`` in ``other_folder`` is where a rename put it.
    ``name`` of a mark is its text. Folders are inodes too.
    """

    kind: str
    folder: int = 0
    name: str = ""
    inode: int = 0
    other_folder: int = 0
    other_name: str = ""
    offset: int = 0
    length: int = 0
    data: bytes = b""


_HEAD = struct.Struct("=4I5Q")
_KINDS = {**dict(enumerate(KINDS)), 100: "root", 101: "mark"}


def read_record(path: str | os.PathLike[str]) -> list[Event]:
    """What ``SystemCalls.record`` has written, in order."""
    return list(_events(memoryview(Path(path).read_bytes())))


def _events(content: memoryview) -> Iterator[Event]:
    at = 0
    while at < len(content):
        number, name_length, other_length, _, folder, inode, other_folder, offset, length = _HEAD.unpack_from(
            content, at
        )
        at += _HEAD.size
        kind = _KINDS[number]
        parts = []
        for size in (name_length, other_length, length if kind == "write" else 0):
            parts.append(bytes(content[at : at + size]))
            at += size
        name, other_name, data = parts
        yield Event(kind, folder, os.fsdecode(name), inode, other_folder, os.fsdecode(other_name), offset, length, data)


# ---- what becomes of that which was not synced ------------------------------------------------------------------------


class Fate(Protocol):
    """Decides what is left of what was not synced."""

    def keeps_change(self) -> bool:
        """Whether a change of a folder's entries has reached the disk."""

    def keeps_bytes(self, length: int) -> tuple[int, bool]:
        """How many bytes of a write, from its first on, have reached the disk; whether the file is as long as after it."""


class AllLost:
    """Nothing is left."""

    def keeps_change(self) -> bool:
        """No."""
        return False

    def keeps_bytes(self, length: int) -> tuple[int, bool]:
        """None, and the file has not grown."""
        return 0, False


class AllKept:
    """Everything is left, as after a process was killed."""

    def keeps_change(self) -> bool:
        """Yes."""
        return True

    def keeps_bytes(self, length: int) -> tuple[int, bool]:
        """All."""
        return length, True


class Drawn:
    """Each thing has a fate of its own, and in some states most is lost, in others most kept."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._luck = dice.choice((0.1, 0.5, 0.5, 0.9))

    def keeps_change(self) -> bool:
        """Perhaps."""
        return self._dice.random() < self._luck

    def keeps_bytes(self, length: int) -> tuple[int, bool]:
        """All, none, zeros in their place, or all up to some sector."""
        if self._dice.random() < self._luck:
            return length, True
        torn = SECTOR * self._dice.randrange(length // SECTOR + 1)
        return self._dice.choice((0, torn)), self._dice.random() < 0.5


# ---- the disk -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    synced: bytes = b""
    pending: list[Event] = field(default_factory=list)

    def content(self, fate: Fate) -> bytes:
        data = bytearray(self.synced)
        for event in self.pending:
            if event.kind == "truncate":
                if fate.keeps_change():
                    _resize(data, event.length)
                continue
            kept, grows = fate.keeps_bytes(event.length)
            end = event.offset + (event.length if grows else kept)
            if (kept or grows) and end > len(data):
                _resize(data, end)
            data[event.offset : event.offset + kept] = event.data[:kept]
        return bytes(data)

    def sync(self) -> None:
        if self.pending:
            self.synced = self.content(AllKept())
            self.pending.clear()


def _resize(data: bytearray, length: int) -> None:
    del data[length:]
    data.extend(bytes(length - len(data)))


@dataclass(eq=False)
class _Folder:
    synced: dict[str, _Node] = field(default_factory=dict)


_Node: TypeAlias = "_File | _Folder"


@dataclass(frozen=True, eq=False)
class _Change:
    """Entries that changed in one step: folder, name, and what the name stands for now; None: nothing."""

    entries: tuple[tuple[_Folder, str, _Node | None], ...]

    @property
    def names(self) -> set[tuple[int, str]]:
        return {(id(folder), name) for folder, name, _ in self.entries}


class Disk:
    """What has been done to it, and what of that is sure."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._nodes: dict[int, _Node] = {}  # by the inode's number, which is used again when a file has gone
        self._changes: list[_Change] = []
        self._marks: list[str] = []

    @property
    def marks(self) -> tuple[str, ...]:
        """What the process has said so far."""
        return tuple(self._marks)

    def apply(self, event: Event) -> None:
        """What was done next."""
        match event.kind:
            case "root":
                self._nodes[event.inode] = self._root
            case "mark":
                self._marks.append(event.name)
            case "create" | "mkdir":
                self._nodes[event.inode] = _File() if event.kind == "create" else _Folder()
                self._change((event.folder, event.name, event.inode))
            case "link":
                self._change((event.folder, event.name, event.inode))
            case "unlink" | "rmdir":
                self._change((event.folder, event.name, None))
            case "rename":
                self._change((event.folder, event.name, None), (event.other_folder, event.other_name, event.inode))
            case "write" | "truncate":
                self._file(event.inode).pending.append(event)
            case "sync":
                self._sync(self._nodes[event.inode])
            case _:
                raise ValueError(f"{event.kind!r} changes nothing")

    def after_power_loss(self, fate: Fate) -> Tree:
        """One of the states that the folder may be in when the machine is up again."""
        entries: dict[int, dict[str, _Node]] = {}
        lost: set[tuple[int, str]] = set()
        for change in self._changes:
            if change.names & lost or not fate.keeps_change():
                lost |= change.names
                continue
            for folder, name, node in change.entries:
                _set(entries.setdefault(id(folder), dict(folder.synced)), name, node)
        contents: dict[int, bytes] = {}

        def tree(folder: _Folder) -> Tree:
            found: Tree = {}
            for name, node in entries.get(id(folder), folder.synced).items():
                if isinstance(node, _Folder):
                    found[name] = tree(node)
                else:  # a file with two names is one file
                    if id(node) not in contents:
                        contents[id(node)] = node.content(fate)
                    found[name] = contents[id(node)]
            return found

        return tree(self._root)

    def _file(self, inode: int) -> _File:
        node = self._nodes[inode]
        assert isinstance(node, _File)
        return node

    def _folder(self, inode: int) -> _Folder:
        node = self._nodes[inode]
        assert isinstance(node, _Folder)
        return node

    def _change(self, *entries: tuple[int, str, int | None]) -> None:
        self._changes.append(
            _Change(
                tuple(
                    (self._folder(folder), name, None if inode is None else self._nodes[inode])
                    for folder, name, inode in entries
                )
            )
        )

    def _sync(self, node: _Node) -> None:
        if isinstance(node, _File):
            node.sync()
            return
        names: set[tuple[int, str]] = set()
        sure: list[_Change] = []
        for change in reversed(self._changes):  # with a rename, what was done before to its other name is sure too
            if change.names & names or any(folder is node for folder, _, _ in change.entries):
                names |= change.names
                sure.append(change)
        self._changes = [change for change in self._changes if change not in sure]
        for change in reversed(sure):
            for folder, name, target in change.entries:
                _set(folder.synced, name, target)


def _set(entries: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


# ---- trees ----------------------------------------------------------------------------------------------------------


def read_tree(folder: str | os.PathLike[str]) -> Tree:
    """What is in a folder now."""
    return {
        path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in sorted(Path(folder).iterdir())
    }


def write_tree(tree: Tree, folder: str | os.PathLike[str]) -> None:
    """Put all of it into an empty folder."""
    for name, content in tree.items():
        path = Path(folder, name)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.mkdir()
            write_tree(content, path)
