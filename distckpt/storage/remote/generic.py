"""Objects in any file system that fsspec knows, as far as it can create one exclusively: the probe finds that out.

fsspec promises nothing there. Its base class looks and then writes, so that is never used; what a file system has of its
own is tried, and refused by the probe if two writers can win. Nothing is known of checksums, and no request has a deadline
but what the file system sets itself.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from distckpt.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StoreOutcomeUnknownError,
    StoreUnsuitableError,
)
from distckpt.storage.bounds import require_within
from distckpt.storage.interface import ObjectInfo, Source
from distckpt.storage.paths import folder_parts, is_part, object_parts
from distckpt.storage.remote.http import DENIED, Outcome, outcome
from distckpt.storage.remote.options import password_of, positive, without, without_password
from distckpt.storage.sections import checked

logger = logging.getLogger(__name__)

PATIENCE = 300.0
_LONGEST_PAUSE = 10.0
_PIECE = 16 << 20
_CREATED_WHOLE = 8 << 20
_LOOKS = 4
_FINAL = (PermissionError, NotImplementedError, TypeError, ValueError)
_MODIFIED = ("mtime", "modified", "last_modified", "LastModified", "updated", "timeModified", "created")
_OTHER_NAMES = {"gcs": "gs", "s3a": "s3", "local": "file"}


def open_fsspec(location: str, options: Mapping[str, Any]) -> FsspecStore:
    """The store at that URL; ``options`` go to its file system as they are, but for ``patience``.

    ``patience``: how many seconds a write is tried that gets no answer. StoreUnsuitableError if fsspec knows no such
    scheme, or what it needs for it is not installed.
    """
    scheme = location.partition("://")[0]
    if scheme in _OTHER_NAMES:
        raise StoreUnsuitableError(
            location, f"write {_OTHER_NAMES[scheme]}:// for {scheme}://, so that it has one name"
        )
    passed_on = dict(options)
    patience = positive(passed_on, "patience", PATIENCE)
    passed_on.pop("patience", None)
    if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise StoreUnsuitableError(location, f"there is no store for {scheme}://, neither here nor in fsspec")
    return FsspecStore(location, passed_on, patience=patience)


class FsspecStore:
    """Objects below ``location`` in a file system of fsspec's, which is this store's own and caches no listing.

    How an object is created once: by ``pipe_file``, where the file system has one of its own that takes ``mode`` or
    ``overwrite``, else by ``open(mode="xb")``. Folders that a file system keeps when they are empty are not shown, which
    takes one more listing a folder; they stay, as some file systems remove a folder with all that is in it.
    """

    def __init__(self, location: str, options: Mapping[str, Any], *, patience: float = PATIENCE) -> None:
        self._url = location
        self._shown = without_password(location)
        self._password = password_of(location)
        self._options = dict(options)
        self._patience = patience
        self._lock = threading.Lock()
        self._opened: tuple[int, AbstractFileSystem, str] | None = None
        self._is_known_whole = False
        self._open_fs()

    @property
    def url(self) -> str:
        """The URL of the root."""
        return self._url

    def explain(self) -> str:
        """See SupportsExplaining."""
        fs, _ = self._open_fs()
        tried = f"{_way(fs)[0]} of {type(fs).__module__}.{type(fs).__name__}, fsspec {fsspec.__version__}"
        return f"Tried was {tried}. Use a directory that all hosts share, or a store that creates an object only once"

    def put_if_absent(self, path: str, data: bytes) -> None:
        """Create ``path`` whole, by the one way that the file system has for that.

        Whatever it answers but success, the object is read back: the same bytes mean that this call has won. If nothing
        is there the same goes again, for as long as there is patience, unless the file system refuses for good.
        """
        object_parts(path)
        self._create(path, bytes(data))

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """Write ``path`` and look how long it has become. What is left of a failed write is removed.

        Up to 8 MiB are created exclusively; of more, two writers of one name are not told apart.
        """
        object_parts(path)
        if self.stat(path) is not None:
            raise AlreadyExistsError(self._full(path))
        if size <= _CREATED_WHOLE:
            whole = bytearray()
            for section in checked(size, sections):
                whole += section
            self._create(path, bytes(whole))
        else:
            self._write(path, checked(size, sections))
        info = self.stat(path)
        if info is None or info.size != size:
            found = "nothing" if info is None else f"{info.size} bytes"
            raise StorageError(self._full(path), f"{size} bytes were written, and the store holds {found}")
        return info

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path`` by ``pipe_file``; whether readers see it whole is the file system's to say."""
        object_parts(path)
        fs, key = self._find(path)
        with self._asking(path, "written"):
            _in_folder(fs, key, lambda: fs.pipe_file(key, bytes(data)))

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole content. ObjectNotFoundError if there is none, DamagedError if it is longer than ``max_bytes``."""
        said, came = 0, 0
        for _ in range(_LOOKS):
            info = self.stat(path)
            if info is None:
                raise ObjectNotFoundError(self._full(path))
            if info.size > max_bytes:
                raise DamagedError(self._full(path), f"is {info.size} bytes long, {max_bytes} are the most it may be")
            # A byte more than there was: what was replaced meanwhile by something longer must not pass for a part of it.
            data = self._range(path, 0, info.size + 1) if info.size else b""
            said, came = info.size, len(data)
            if said == came:
                return data
        raise StorageError(self._full(path), f"has {said} bytes, but {came} came")

    def open(self, path: str) -> Source:
        """Open an object for ranged reads. ObjectNotFoundError if there is none."""
        info = self.stat(path)
        if info is None:
            raise ObjectNotFoundError(self._full(path))
        return FsspecSource(self._full(path), info.size, lambda start, end: self._range(path, start, end))

    def stat(self, path: str) -> ObjectInfo | None:
        """What is at ``path`` now, or None."""
        object_parts(path)
        fs, key = self._find(path)
        try:
            with self._asking(path, "looked at"):
                fs.invalidate_cache()
                entry = fs.info(key)
        except ObjectNotFoundError:
            return None
        return self._info(path, entry) if entry["type"] == "file" else None

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object directly below ``folder``."""
        for name, entry in self._entries(folder, "file"):
            yield self._info("/".join((*folder_parts(folder), name)), entry)

    def folders(self, folder: str) -> Iterator[str]:
        """Names of the folders directly below ``folder`` in which there is anything."""
        for name, _ in self._entries(folder, "directory"):
            below = "/".join((*folder_parts(folder), name))
            if next(self._entries(below, "file"), None) or next(self.folders(below), None):
                yield name

    def delete(self, path: str) -> None:
        """Remove an object; no error if it is gone already."""
        object_parts(path)
        fs, key = self._find(path)
        with contextlib.suppress(ObjectNotFoundError), self._asking(path, "deleted"):
            fs.rm_file(key)

    def _full(self, path: str) -> str:
        """The name of an object or folder in what is said of it, which has no password in it."""
        return f"{self._shown}/{path}" if path else self._shown

    def _said(self, error: BaseException) -> str:
        text = without(" ".join(str(error).split()), self._password)[:300]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__

    def _cause(self, error: BaseException) -> BaseException | None:
        """The error, unless a traceback that shows it would show a password."""
        return None if self._password else error

    def _open_fs(self) -> tuple[AbstractFileSystem, str]:
        """The file system and the root's name in it. A forked child gets one of its own."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                try:
                    # Not one that others use too, whose listings may be cached as they like.
                    fs, root = fsspec.core.url_to_fs(self._url, skip_instance_cache=True, **self._options)
                except ImportError as error:
                    raise StoreUnsuitableError(
                        self._shown, f"{self._said(error)}. Install that, and try again"
                    ) from error
                except Exception as error:  # noqa: BLE001  it becomes one of ours
                    raise StorageError(self._shown, f"could not be opened: {self._said(error)}") from self._cause(error)
                if hasattr(fs.dircache, "use_listings_cache"):
                    fs.dircache.use_listings_cache = False
                    fs.dircache.clear()
                self._opened = (os.getpid(), fs, root.rstrip("/"))
            return self._opened[1:]

    def _find(self, path: str) -> tuple[AbstractFileSystem, str]:
        fs, root = self._open_fs()
        return fs, f"{root}/{path}" if path else root

    @contextlib.contextmanager
    def _asking(self, path: str, done: str) -> Iterator[None]:
        try:
            yield
        except (StorageError, DamagedError):
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ObjectNotFoundError(self._full(path)) from error
        except Exception as error:  # noqa: BLE001  it becomes one of ours
            raise _kind(error)(self._full(path), f"could not be {done}: {self._said(error)}") from self._cause(error)

    def _create(self, path: str, data: bytes) -> None:
        fs, key = self._find(path)
        create = _way(fs)[1] or self._create_by_opening
        deadline, pause, is_first = time.monotonic() + self._patience, 0.1, True
        while True:
            try:
                _in_folder(fs, key, lambda: create(fs, key, data))
            except StoreUnsuitableError:
                raise
            except Exception as error:  # noqa: BLE001  what it means is decided by what is there
                refusal = error
            else:
                return
            try:
                found = self._looks_like(path, data)
            except StorageError as error:
                refusal = error
            else:
                if found:
                    return
                if found is not None:
                    raise AlreadyExistsError(self._full(path)) from refusal
                if _is_final(refusal):
                    message = f"could not be created: {self._said(refusal)}"
                    kind = _kind(refusal) if is_first else StorageError  # what was sent before may yet create it
                    raise kind(self._full(path), message) from self._cause(refusal)
            if time.monotonic() + pause > deadline:
                message = f"no answer in {self._patience:g} s says whether it was created: {self._said(refusal)}"
                raise StoreOutcomeUnknownError(self._full(path), message) from self._cause(refusal)
            level = logging.WARNING if is_first else logging.INFO
            logger.log(level, "%s is created once more: %s", self._full(path), self._said(refusal))
            is_first = False
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _create_by_opening(self, fs: AbstractFileSystem, key: str, data: bytes) -> None:
        """``open`` exclusively. Nothing may be seen of it before it is closed: a killed writer would leave half of it."""
        with fs.open(key, "xb") as file:
            file.write(data)
            shows = False
            if not self._is_known_whole:
                fs.invalidate_cache()
                shows = bool(fs.exists(key))
        if shows:
            fs.rm_file(key)
            raise StoreUnsuitableError(
                self._shown,
                "what is opened with mode 'xb' is seen before it is written, so a writer that is killed would leave a part of "
                f"an object in the way of all others. {self.explain()}",
            )
        self._is_known_whole = True

    def _looks_like(self, path: str, data: bytes) -> bool | None:
        try:
            return self.read(path, len(data)) == data
        except ObjectNotFoundError:
            return None
        except DamagedError:
            return False

    def _write(self, path: str, sections: Iterator[memoryview]) -> None:
        fs, key = self._find(path)
        with self._asking(path, "written"):
            file = _in_folder(fs, key, lambda: fs.open(key, "wb"))
        try:
            for section in sections:
                with self._asking(path, "written"):
                    file.write(section)
            with self._asking(path, "written"):
                file.close()
        except BaseException:
            _abandon(file)
            with contextlib.suppress(StorageError):  # what is left is nobody's, and gc finds it
                self.delete(path)
            raise

    def _range(self, path: str, start: int, end: int) -> bytes:
        fs, key = self._find(path)
        with self._asking(path, "read"):
            return bytes(fs.cat_file(key, start=start, end=end))

    def _entries(self, folder: str, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What is directly below ``folder``, by name."""
        folder_parts(folder)
        fs, key = self._find(folder)
        with contextlib.suppress(ObjectNotFoundError), self._asking(folder, "listed"):
            fs.invalidate_cache()
            for entry in fs.ls(key, detail=True):
                above, _, name = str(entry["name"]).rstrip("/").rpartition("/")
                if entry["type"] == kind and is_part(name) and above.strip("/") == key.strip("/"):
                    yield name, entry

    def _info(self, path: str, entry: Mapping[str, Any]) -> ObjectInfo:
        if entry.get("size") is None:
            raise StorageError(self._full(path), "its file system does not say how long it is")
        return ObjectInfo(path, int(entry["size"]), _modified(entry))


class FsspecSource:
    """An object open for reading: each range is a request."""

    def __init__(self, full: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._full = full
        self._size = size
        self._fetch = fetch

    @property
    def size(self) -> int:
        """The object's size in bytes when it was opened."""
        return self._size

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``position`` on. DamagedError if the object ends before that."""
        left = target.cast("B")
        require_within(self._size, position, left.nbytes, self._full)
        while left.nbytes:
            count = min(left.nbytes, _PIECE)
            piece = self._fetch(position, position + count)
            if len(piece) != count:
                raise StorageError(
                    self._full, f"{count} bytes from {position} on were asked for, but {len(piece)} came"
                )
            left[:count] = piece
            left, position = left[count:], position + count

    def close(self) -> None:
        """Let go of the object. Closing twice does no harm."""


def _way(fs: AbstractFileSystem) -> tuple[str, Callable[[AbstractFileSystem, str, bytes], None] | None]:
    """What the file system has for creating an object once, in words and as a function; none is ``open``."""
    own = type(fs)._pipe_file if isinstance(fs, AsyncFileSystem) else type(fs).pipe_file
    known = inspect.signature(own).parameters
    if own not in (AsyncFileSystem._pipe_file, AbstractFileSystem.pipe_file):
        if "mode" in known:
            return "pipe_file(mode='create')", lambda fs, key, data: fs.pipe_file(key, data, mode="create")
        if "overwrite" in known:
            return "pipe_file(overwrite=False)", lambda fs, key, data: fs.pipe_file(key, data, overwrite=False)
    return "open(mode='xb')", None


def _in_folder(fs: AbstractFileSystem, key: str, write: Callable[[], Any]) -> Any:
    """What ``write`` returns, done again in a folder that is made if there was none."""
    try:
        return write()
    except FileNotFoundError:
        fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        return write()


def _abandon(file: Any) -> None:
    """Have nothing become of what was written so far."""
    with contextlib.suppress(Exception):  # whatever is left is deleted
        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # else it is finished when it is collected
            file.discard()
        else:
            file.close()


def _modified(entry: Mapping[str, Any]) -> float:
    """When it was written; always the same, 0, if the file system does not say."""
    for name in _MODIFIED:
        value = entry.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _status(error: BaseException) -> int:
    """What the server answered, as aiohttp's errors have it, and those of requests; 0 if none says so."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else 0


def _is_final(error: BaseException) -> bool:
    """Whether the same would be refused the next time, too."""
    status = _status(error)
    return isinstance(error, _FINAL) or (status >= 300 and outcome(status) is Outcome.REFUSED)


def _kind(error: BaseException) -> type[StorageError]:
    return AccessDeniedError if isinstance(error, PermissionError) or _status(error) in DENIED else StorageError
