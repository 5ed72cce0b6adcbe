"""Files of ``torch.save``: a zip archive of a pickle, which is read as data, and of the memory of tensors, uncompressed."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any, Protocol

from distckpt.errors import DamagedError, UnsupportedFormatError
from distckpt.foreign.contents import Held, check_shape
from distckpt.foreign.files import File, read
from distckpt.foreign.pickled_trees import without_opaque
from distckpt.foreign.pickles import Opaque, Storage, View, read_pickle
from distckpt.format.arrow.dtypes import ITEM_SIZES
from distckpt.storage import Source

MAX_PICKLE_BYTES = 256 << 20
"""For the archive's table, too: neither grows with the size of tensors."""

_LOCAL_HEADER = 30
_ZIP = b"PK\x03\x04"
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch wrote before 1.6."""


def is_torch_file(file: File) -> bool:
    """Whether a file looks like one, by its first bytes."""
    return file.size > _LOCAL_HEADER and (file.read(0, len(_ZIP)) == _ZIP or file.read(0, len(_OLD)) == _OLD)


def read_torch_file(file: File, key: str) -> tuple[Any, dict[str, str]]:
    """The tree that was saved, with Held for tensors; and of what only unpickling could make, the keys and why.

    ``key`` is that of the tree. What is not read is missing from its dict. Raises DamagedError for a file that is not sound.
    """
    with file.opened() as source:
        is_old = read(source, 0, len(_ZIP)) != _ZIP
        archive = _Old(file, source) if is_old else _Archive(file, source)
        tree, refused = without_opaque(archive.tree(), key, file.url)
        return _with_places(tree, key, archive, refused), refused


class _Memory(Protocol):
    """An open file, and where in it the memory of tensors is."""

    file: File

    def tree(self) -> Any:
        """What its pickle describes."""

    def position(self, storage: Storage) -> int:
        """Where the bytes of a storage begin, all of which are there. DamagedError if they are not."""


class _Archive:
    """The records of an open archive."""

    def __init__(self, file: File, source: Source) -> None:
        self.file = file
        self._source = source
        try:
            self._zip = zipfile.ZipFile(_Stream(source, file.url))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise DamagedError(file.url, f"no sound archive: {error}") from error
        records = self._zip.infolist()
        self._records = {record.filename: record for record in records}
        pickles = [name for name in self._records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(self._records) < len(records) or len(pickles) != 1:
            raise DamagedError(
                file.url, "an archive that torch.save has not made: it has no data.pkl, or names come twice"
            )
        self._root = pickles[0].partition("/")[0]
        if "byteorder" in self and self.record("byteorder") != b"little":
            raise UnsupportedFormatError(file.url, "numbers of another byte order than this machine's")
        self._positions: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._records

    def tree(self) -> Any:
        """See _Memory."""
        return read_pickle(self.record("data.pkl"), self.file.url)

    def record(self, name: str) -> bytes:
        """All of a small record. DamagedError if it is large, or not as its CRC says."""
        record = self._record(name)
        if record.file_size > MAX_PICKLE_BYTES:
            raise DamagedError(self.file.url, f"{name} has {record.file_size} bytes")
        try:
            return self._zip.read(record)
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError) as error:
            raise DamagedError(self.file.url, f"{name}: {error}") from error

    def position(self, storage: Storage) -> int:
        """See _Memory."""
        name, nbytes = f"data/{storage.key}", storage.nbytes
        if name not in self._positions:
            record = self._record(name)
            begin = record.header_offset
            header = read(self._source, begin, _LOCAL_HEADER) if begin + _LOCAL_HEADER <= self.file.size else b""
            if header[:4] != b"PK\x03\x04":
                raise DamagedError(self.file.url, f"{name} is not where the archive says")
            texts = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            self._positions[name] = begin + _LOCAL_HEADER + texts
        position, size = self._positions[name], self._record(name).file_size
        if nbytes > size or position + size > self.file.size:
            raise DamagedError(
                self.file.url, f"{name} has {size} bytes, less than {nbytes}, or lies outside of the file"
            )
        return position

    def _record(self, name: str) -> zipfile.ZipInfo:
        record = self._records.get(f"{self._root}/{name}")
        if record is None:
            raise DamagedError(self.file.url, f"{name} is missing")
        if (
            record.compress_type != zipfile.ZIP_STORED
            or record.flag_bits & 1
            or record.file_size != record.compress_size
        ):
            raise DamagedError(self.file.url, f"{name} is compressed or encrypted, which torch.save never does")
        return record


class _Old:
    """A file as torch wrote them before 1.6: pickles, the last of which names the storages that follow, each with its size."""

    def __init__(self, file: File, source: Source) -> None:
        self.file = file
        self._source = source
        stream = io.BufferedReader(_Stream(source, file.url, MAX_PICKLE_BYTES))
        self._item_sizes: dict[str, int] = {}
        _, version, _, self._tree, self._keys = (read_pickle(stream, file.url, self._item_sizes) for _ in range(5))
        self._end = stream.tell()
        if version != 1001 or not isinstance(self._keys, list) or not all(type(key) is str for key in self._keys):
            raise DamagedError(file.url, "not as torch has written files")
        self._places: dict[str, tuple[int, int]] = {}

    def tree(self) -> Any:
        """See _Memory."""
        return self._tree

    def position(self, storage: Storage) -> int:
        """See _Memory. Where one begins is known when those before it have been passed, whose types the pickle says."""
        if not self._places:
            sizes = self._item_sizes
            at = self._end
            for key in self._keys:
                if key not in sizes or at + 8 > self.file.size:
                    break
                numel = int.from_bytes(read(self._source, at, 8), "little")
                self._places[key] = (at + 8, numel * sizes[key])
                at += 8 + numel * sizes[key]
        position, size = self._places.get(storage.key, (0, -1))
        if size != storage.nbytes or position + size > self.file.size:
            raise DamagedError(self.file.url, f"storage {storage.key} is missing, or of another size")
        return position


class _Stream(io.RawIOBase):
    """A source as zipfile wants it. What is asked for at once is bounded, whatever a file says, and so is all that is read
    if there is a ``limit``."""

    def __init__(self, source: Source, where: str, limit: int | None = None) -> None:
        super().__init__()
        self._source = source
        self._where = where
        self._limit = limit
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        if begin + offset < 0:
            raise ValueError("a place before the file")
        self._at = begin + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._at)
        count = left if size < 0 else min(size, left)
        if count > MAX_PICKLE_BYTES or (self._limit is not None and self._at + count > self._limit):
            raise DamagedError(self._where, f"a table, a pickle or a small record of more than {count} bytes")
        data = read(self._source, self._at, count)
        self._at += count
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _with_places(node: Any, key: str, archive: _Memory, refused: dict[str, str]) -> Any:
    if isinstance(node, View):
        return _held(node, key, archive)
    if type(node) is dict:
        found = {
            name: _with_places(item, f"{key}.{name}" if key else str(name), archive, refused)
            for name, item in node.items()
        }
        for name, item in found.items():
            if isinstance(item, Opaque):
                refused[f"{key}.{name}" if key else str(name)] = item.what
        return {name: item for name, item in found.items() if not isinstance(item, Opaque)}
    if type(node) in (list, tuple):
        items = [_with_places(item, f"{key}.{number}", archive, refused) for number, item in enumerate(node)]
        hurt = next((item for item in items if isinstance(item, Opaque)), None)
        return hurt if hurt is not None else type(node)(items)
    return node


def _held(view: View, key: str, archive: _Memory) -> Held | Opaque:
    """Where the bytes of a view are. Opaque if its elements share memory, so that it is more than there is."""
    where, item = archive.file.url, ITEM_SIZES[view.dtype]
    shape = check_shape(where, key, view.shape)
    storage = view.storage
    span = sum((length - 1) * stride for length, stride in zip(shape, view.strides, strict=True)) + 1
    if 0 in shape:
        span = 0
    if (view.offset + span) * item > storage.nbytes:
        raise DamagedError(where, "a tensor that is larger than the memory it lies in", key)
    if math.prod(shape) > span:
        return Opaque("a tensor whose elements share memory, as after expand(): save a clone() of it")
    position = archive.position(storage) + view.offset * item if span else 0
    return Held(archive.file, position, view.dtype, shape, _strides(shape, view.strides))


def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """None if the elements lie in row-major order."""
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != step:
            return None if 0 in shape else strides
        step *= length
    return None
