"""Where files of other programs are. Their names may come from other files, and so are plain ones, never paths."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.errors import CheckpointNotFoundError, DamagedError
from distckpt.format.limits import shown
from distckpt.storage import PathLike, Source, Store, canonical, join, open_store, split_path
from distckpt.storage.outside import read_hidden

_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,254}")


@dataclass(frozen=True, slots=True)
class File:
    """A file of ``size`` bytes at ``path`` of ``store``. ``name`` is what it is called, which a link may call otherwise."""

    store: Store
    path: str
    name: str
    size: int

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return join(self.store.url, self.path)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Source]:
        """The file, open for reading."""
        with contextlib.closing(self.store.open(self.path)) as source:
            yield source

    def read(self, position: int, nbytes: int) -> bytes:
        """Bytes from ``position`` on. DamagedError if it ends before that."""
        with self.opened() as source:
            return read(source, position, nbytes)

    def content(self, most: int) -> bytes:
        """All of it. DamagedError if that is more than ``most`` bytes."""
        return self.store.read(self.path, most)


@dataclass(frozen=True, slots=True)
class Section(File):
    """``size`` bytes of a larger file, from its byte ``begin`` on, which are a file by themselves."""

    begin: int

    @contextlib.contextmanager
    def opened(self) -> Iterator[Source]:
        """See File."""
        with contextlib.closing(self.store.open(self.path)) as source:
            yield _Section(source, self.begin, self.size)

    def content(self, most: int) -> bytes:
        """See File."""
        if self.size > most:
            raise DamagedError(self.url, f"{self.size} bytes where {most} are the most")
        return self.read(0, self.size)


class _Section:
    """An open section."""

    def __init__(self, source: Source, begin: int, size: int) -> None:
        self._source = source
        self._begin = begin
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, position: int, target: memoryview) -> None:
        if not 0 <= position <= self._size - target.nbytes:
            raise DamagedError("a part of a file", f"it ends before byte {position + target.nbytes}")
        self._source.read_into(self._begin + position, target)

    def close(self) -> None:
        self._source.close()


def read(source: Source, position: int, nbytes: int) -> bytes:
    """Bytes of an open file."""
    target = bytearray(nbytes)
    source.read_into(position, memoryview(target))
    return bytes(target)


class Folder:
    """The folder at ``url``, of whose files each is looked for by its name.

    Where a name is a symbolic link on this host it is followed: the caches of other programs are full of such.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None) -> None:
        self.url = url
        self._options = storage_options
        self._stores: dict[str, Store] = {}
        self._names: frozenset[str] | None = None

    def inside(self, name: str) -> Folder:
        """The folder of that name in this one, whether or not it is there."""
        return Folder(join(self.url, name), self._options)

    def names(self) -> frozenset[str]:
        """What is in it, files and folders, as it was when this was asked first. Links and hidden files are not among it."""
        if self._names is None:
            store = self._store(self.url)
            self._names = frozenset((*(info.path for info in store.list("")), *store.folders("")))
        return self._names

    def find(self, name: str) -> File | None:
        """The file of that name; None if there is none. ValueError for a name that is a path."""
        if _PLAIN.fullmatch(name) is None:
            raise ValueError(f"{shown(name)} is no plain file name")
        where = join(self.url, name)
        root, path = (self.url, name) if "://" in self.url else split_path(where)
        store = self._store(root)
        info = store.stat(path)
        return None if info is None else File(store, path, name, info.size)

    def _store(self, root: str) -> Store:
        if root not in self._stores:
            self._stores[root] = open_store(root, self._options)
        return self._stores[root]

    def hidden(self, name: str, most: int) -> bytes | None:
        """What is in a file whose name begins with a dot, which stores keep for themselves; None if there is none.

        In a local folder only. DamagedError for more than ``most`` bytes.
        """
        return None if "://" in self.url else read_hidden(self.url, name, most)

    def named_in(self, name: str, by: File) -> File:
        """A file of this folder that another one names. DamagedError if it names anything else, or one that is missing."""
        try:
            found = self.find(name)
        except ValueError as error:
            raise DamagedError(by.url, f"it names a file outside of its folder, or none: {error}") from error
        if found is None:
            raise DamagedError(by.url, f"it names {shown(name)}, which is missing")
        return found


@dataclass(frozen=True, slots=True)
class Found:
    """A place to be read: the ``folder``, or the one ``file`` in it that was meant. ``under`` names what has no name."""

    folder: Folder
    file: File | None
    under: str

    @property
    def path(self) -> str:
        """What people call it."""
        return self.folder.url if self.file is None else join(self.folder.url, self.file.name)


def place(path: PathLike, storage_options: Mapping[str, Any] | None) -> tuple[Folder, File | None]:
    """The folder at ``path``; or, if a file is there, that, and the folder that it is in."""
    given = os.fspath(path).rstrip("/")
    above, _, name = (canonical(given) if "://" in given else os.path.abspath(os.path.expanduser(given))).rpartition(
        "/"
    )
    if above and not above.endswith(":/") and _PLAIN.fullmatch(name):
        folder = Folder(above, storage_options)
        file = folder.find(name)
        if file is not None:
            return folder, file
    return Folder(canonical(path), storage_options), None


def nothing_known(url: str) -> CheckpointNotFoundError:
    """The error for a place at which there is nothing that can be read here."""
    return CheckpointNotFoundError(
        url,
        "no file that can be read here: a safetensors file, one of torch.save or of Lightning, or a folder with "
        "model.safetensors, pytorch_model.bin, the index of several of them, pytorch_model_fsdp.bin or pytorch_model_fsdp_0 of "
        "Accelerate, or .metadata of torch.distributed.checkpoint. Give a file of another name by its own path",
    )
