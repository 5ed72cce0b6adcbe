"""Objects as files under one folder of a local or shared POSIX file system."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from distckpt.errors import (
    AlreadyExistsError,
    BlockedError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StoreUnsuitableError,
)
from distckpt.storage.direct import SequentialFile
from distckpt.storage.folders import (
    Folders,
    is_folder,
    make_root,
    open_folders,
    remove_empty,
    sync_way_to,
    visiting,
)
from distckpt.storage.holes import is_hollow
from distckpt.storage.interface import ObjectInfo, Source
from distckpt.storage.mounts import described
from distckpt.storage.oserrors import deleting, published, publishing, reading, writing
from distckpt.storage.paths import PathLike, folder_parts, is_part, object_parts
from distckpt.storage.room import has_room
from distckpt.storage.sections import checked, write_behind

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_EXISTING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: a planted FIFO must not hang the reader
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_READ_BYTES = 1 << 30
_FOLDER_TRIES = 16
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")

_Found = TypeVar("_Found")


class LocalStore:
    """Objects as files below ``root``, which the first write creates together with its parents, and makes durable.

    A write that fails leaves no folder behind that was made for it. ``root`` may be a symbolic link; nothing below it is
    followed if it is one. A root that this store has seen and that is gone later is not created again: then writes fail,
    and reads find nothing. Temporary files begin with a dot and are never listed. A deleted object takes the folders that
    it leaves empty with it. Safe to use from several threads. Large objects go through the page cache where memory has
    room to keep them for readers (a quarter of what is available, for all ranks of the host together), else around it;
    ``direct_io`` says True or False to that.
    """

    def __init__(self, root: PathLike, *, direct_io: bool | None = None) -> None:
        self._root = os.path.abspath(os.path.expanduser(os.fspath(root)))
        self._direct_io = direct_io
        self._seen = os.path.isdir(self._root)
        self._is_durable = False
        self._made: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The absolute path of the root."""
        return self._root

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` by linking a synced temporary file to the name, which exactly one of many can do.

        Both answers are durable: that it was created, and, by AlreadyExistsError, that it exists. BlockedError if what
        exists is no plain file.
        """
        name = object_parts(path)[-1]
        with self._temporary(path, data) as new:
            with publishing(self._full(path)):
                created = _link(new, name, self._full(path))
            new.unlink()
            with published(self._full(path)):
                new.folders.sync()
        if not created:
            raise AlreadyExistsError(self._full(path))

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path`` whole by renaming a synced temporary file over it."""
        name = object_parts(path)[-1]
        with self._temporary(path, data) as new:
            with publishing(self._full(path)):
                os.replace(new.name, name, src_dir_fd=new.folders.fd, dst_dir_fd=new.folders.fd)
            with published(self._full(path)):
                new.folders.sync()

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Write ``path`` under its final name, as nothing refers to it before it is whole.

        Where there is no room to keep it, page-aligned sections go to the disk with O_DIRECT. What is left of a failed write
        is removed. Exceptions of ``sections`` come out unchanged. ValueError if the sections do not sum to ``size``.
        """
        full = self._full(path)
        with self._new_file(path, object_parts(path)[-1]) as new:
            try:
                self._write_sections(new, full, size, sections)
                with writing(full):
                    os.fsync(new.fd)
                    new.folders.sync()
                    modified = os.fstat(new.fd).st_mtime
            except BaseException:
                new.unlink()
                raise
        return ObjectInfo(path, size, modified)

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content. ObjectNotFoundError if there is none, DamagedError if it is longer than ``max_bytes``.

        DamagedError too, before any memory is taken, for a large file that is hardly more than a hole.
        """
        with contextlib.closing(self._open(path)) as source:
            if source.size > max_bytes:
                raise DamagedError(self._full(path), f"is {source.size} bytes long, {max_bytes} are the most it may be")
            return source.content()

    def open(self, path: str) -> Source:
        """Open an object for ranged reads. ObjectNotFoundError if there is none, DamagedError if it is no plain file."""
        return self._open(path)

    def cool(self, path: str) -> None:
        """Have the page cache keep nothing of an object that is on the disk already."""
        with contextlib.suppress(StorageError), contextlib.closing(self._open(path)) as source:
            source.cool()

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or None. DamagedError if that is a symbolic link or another thing but a file."""
        *above, name = object_parts(path)
        full = self._full(path)
        try:
            with reading(full), self._visit(above) as folders:
                status = os.stat(name, dir_fd=folders.fd, follow_symlinks=False)
                _refuse_other_than_file(full, status)
        except ObjectNotFoundError:
            return None
        return ObjectInfo(path, status.st_size, status.st_mtime)

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder``. What vanishes meanwhile is left out."""
        parts = folder_parts(folder)
        return self._scan(parts, lambda entry: _object(parts, entry))

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder``."""
        return self._scan(folder_parts(folder), _folder)

    def sweep(self, left: Collection[ObjectInfo]) -> int:
        """Remove these temporary files, as long as they are as they were, and the folders that only they kept."""
        gone = 0
        for info in left:
            *above, name = info.path.split("/")
            if not _TEMPORARY.fullmatch(name):
                continue
            parts = folder_parts("/".join(above))
            with (
                contextlib.suppress(ObjectNotFoundError),
                deleting(self._full(info.path)),
                self._visit(parts) as folders,
            ):
                if _remove_unchanged(name, folders.fd, info):
                    gone += 1
                    folders.prune(parts)
        return gone

    def hidden(self, folder: str) -> Iterator[ObjectInfo]:
        """Temporary files, of writers that live too."""
        parts = folder_parts(folder)
        with contextlib.suppress(ObjectNotFoundError), reading(self._full(folder)):  # noqa: SIM117
            with self._visit(parts) as folders, os.scandir(folders.fd) as entries:
                for entry in entries:
                    found = _object(parts, entry) if _TEMPORARY.fullmatch(entry.name) else None
                    if found is not None:
                        yield found

    def delete(self, path: str) -> None:
        """Remove an object, and the folders that are empty then. After a power loss it may be there again."""
        *above, name = object_parts(path)
        with contextlib.suppress(ObjectNotFoundError), deleting(self._full(path)), self._visit(above) as folders:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folders.fd)
            folders.prune(tuple(above))

    def _full(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _open(self, path: str) -> LocalSource:
        *above, name = object_parts(path)
        full = self._full(path)
        with reading(full):
            with self._visit(above) as folders:
                fd = os.open(name, _EXISTING, dir_fd=folders.fd)
            try:
                status = os.fstat(fd)
                _refuse_other_than_file(full, status)
            except BaseException:
                os.close(fd)
                raise
        return LocalSource(io.FileIO(fd), full, status.st_size)

    def _visit(self, parts: Sequence[str]) -> contextlib.closing[Folders]:
        return visiting(self._root, tuple(parts))

    def _scan(self, parts: tuple[str, ...], take: Callable[[os.DirEntry[str]], _Found | None]) -> Iterator[_Found]:
        """What ``take`` makes of the entries of a folder. Temporary files and names that no store accepts are left out."""
        with contextlib.suppress(ObjectNotFoundError), reading(self._full("/".join(parts))):  # noqa: SIM117
            with self._visit(parts) as folders, os.scandir(folders.fd) as entries:
                for entry in entries:
                    found = take(entry) if is_part(entry.name) else None
                    if found is not None:
                        yield found

    @contextlib.contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[_NewFile]:
        """A file in the folder of ``path`` with ``data``, synced. It is gone on exit."""
        with self._new_file(path, f".{uuid.uuid4().hex}.tmp") as new:
            try:
                with writing(self._full(path)):
                    SequentialFile(new.fd, direct=False).write(memoryview(data).cast("B"))
                    os.fsync(new.fd)
                yield new
            finally:
                new.unlink()

    @contextlib.contextmanager
    def _new_file(self, path: str, name: str) -> Iterator[_NewFile]:
        """A new file ``name`` in the folder of ``path``, which is created if need be."""
        above = object_parts(path)[:-1]
        try:
            with writing(self._full(path)):
                new = self._create(above, name)
            try:
                yield new
            except BaseException:
                new.folders.prune(above)
                raise
            finally:
                new.close()
        except BaseException:
            self._forsake_root()
            raise
        self._made = ()

    def _create(self, above: tuple[str, ...], name: str) -> _NewFile:
        self._require_root()
        for _ in range(_FOLDER_TRIES):
            with contextlib.suppress(FileNotFoundError):  # a delete elsewhere has just taken an empty folder away
                return self._create_once(above, name)
        return self._create_once(above, name)

    def _create_once(self, above: tuple[str, ...], name: str) -> _NewFile:
        folders = open_folders(self._root, above, create=True)
        try:
            return _NewFile(folders, name, os.open(name, _NEW, 0o666, dir_fd=folders.fd))
        except BaseException:
            folders.prune(above)
            folders.close()
            raise

    def _require_root(self) -> None:
        seen = self._seen  # asked first: another thread may be creating the root just now
        if not is_folder(self._root):
            if seen:
                raise StorageError(self._root, "the directory was there and has vanished; it is not created again")
            self._made = make_root(self._root)
        self._seen = True
        if not self._is_durable:
            sync_way_to(self._root)
            self._is_durable = True

    def _forsake_root(self) -> None:
        """Leave nothing of a root that was made for a write which has failed, unless something else is in it by now."""
        made, self._made = self._made, ()
        remove_empty(made)
        if made and not os.path.isdir(self._root):
            self._seen = self._is_durable = False

    def _write_sections(self, new: _NewFile, full: str, size: int, sections: Iterable[memoryview]) -> None:
        file = SequentialFile(new.fd, direct=not has_room(size) if self._direct_io is None else self._direct_io)

        def write(section: memoryview) -> None:
            with writing(full):
                file.write(section)

        write_behind(checked(size, sections), write)


class LocalSource:
    """A file open for reading."""

    def __init__(self, file: io.FileIO, path: str, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size

    @property
    def size(self) -> int:
        """The file's size in bytes when it was opened."""
        return self._size

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``position`` on. DamagedError if the file ends before that."""
        if position < 0:
            raise ValueError(f"position {position} is negative")
        left = target.cast("B")
        while left.nbytes:
            with reading(self._path):
                count = os.preadv(self._file.fileno(), [left[:_READ_BYTES]], position)
            if not count:
                raise DamagedError(self._path, f"ends after {position} bytes, {left.nbytes} more were expected")
            position += count
            left = left[count:]

    def content(self) -> bytes:
        """All of it. DamagedError if it is a large file that is hardly more than a hole."""
        pieces, position = [], 0
        with reading(self._path):
            fd = self._file.fileno()
            if is_hollow(fd, os.fstat(fd)):
                raise DamagedError(
                    self._path, f"of its {self._size} bytes hardly any are on the disk: it was never written"
                )
            while position < self._size:
                piece = os.pread(fd, min(self._size - position, _READ_BYTES), position)
                if not piece:
                    raise DamagedError(self._path, f"ends after {position} bytes, and had {self._size} a moment ago")
                pieces.append(piece)
                position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def cool(self) -> None:
        """Have the page cache keep nothing of the file."""
        with reading(self._path):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file. Closing twice does no harm."""
        with contextlib.suppress(OSError):  # what was read has been read, and nothing was written
            self._file.close()


@dataclass(frozen=True, slots=True)
class _NewFile:
    """A file that this process has just created: ``fd`` is open for writing, ``folders`` lead to it."""

    folders: Folders
    name: str
    fd: int

    def unlink(self) -> None:
        with contextlib.suppress(OSError):  # gone already, or a leftover that nobody refers to
            os.unlink(self.name, dir_fd=self.folders.fd)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all that counts was synced before, so there is nothing left to lose
            os.close(self.fd)
        self.folders.close()


def _folder(entry: os.DirEntry[str]) -> str | None:
    return entry.name if entry.is_dir(follow_symlinks=False) else None


def _object(parts: tuple[str, ...], entry: os.DirEntry[str]) -> ObjectInfo | None:
    if not entry.is_file(follow_symlinks=False):
        return None
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # vanished since the folder was read
        return None
    return ObjectInfo("/".join((*parts, entry.name)), status.st_size, status.st_mtime)


def _link(new: _NewFile, name: str, full: str) -> bool:
    """Give the file its final name too; False if another file has it. BlockedError if something else has.

    StoreUnsuitableError if the file system has no hard links, as exFAT, BeeGFS and some that FUSE serves.
    """
    folder = new.folders.fd
    try:
        os.link(new.name, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return _is_linked(new, name, full)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise StoreUnsuitableError(full, _without_links(full, error)) from error
        raise
    return True


def _without_links(full: str, error: OSError) -> str:
    return (
        f"could not be written: {described(full)} refuses hard links ({error.strerror}), and without them no writer can be the "
        "only one to create an object. Use a directory on a file system that has them, or an object store"
    )


def _is_linked(new: _NewFile, name: str, full: str) -> bool:
    """NFS repeats a request whose answer was lost: then the name that exists already is this very file."""
    try:
        taken = os.stat(name, dir_fd=new.folders.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(taken.st_mode):
        raise BlockedError(full, f"{_what(taken)} is there, where a file is to be written. Move it away")
    return os.path.samestat(taken, os.fstat(new.fd))


def _refuse_other_than_file(full: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ObjectNotFoundError(full)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(full, f"{_what(status)} is there, not a plain file, so it is not read")


def _what(status: os.stat_result) -> str:
    """What is in a file's place."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "a device")


def _remove_unchanged(name: str, folder: int, info: ObjectInfo) -> bool:
    with contextlib.suppress(OSError):  # another sweeper was faster, or it cannot be removed: it is only in the way
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if (status.st_size, status.st_mtime) == (info.size, info.modified):
            os.unlink(name, dir_fd=folder)
            return True
    return False
