"""The operating system's refusals, in the words of distckpt.errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from distckpt.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    BlockedError,
    DamagedError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    StoreOutcomeUnknownError,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MISSING = {errno.ENOENT, errno.ENOTDIR}
_NOT_OURS = {errno.ELOOP, errno.ENXIO, errno.ENODEV}
_BLOCKED = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_UNSURE = {
    errno.EIO,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}


class _Told:
    """Gives an exception that leaves the block to ``tell``, which may raise another one instead.

    Not a generator with ``contextmanager``: from Python 3.12 on what is thrown into one is in a cycle with the frames
    that it came through, which keeps all that their callers hold until garbage is looked for. For the same reason
    nothing here keeps in a variable what it raises.
    """

    __slots__ = ("_path", "_tell")

    def __init__(self, path: str, tell: Callable[[str, BaseException], None]) -> None:
        self._path = path
        self._tell = tell

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._tell(self._path, error)


def reading(path: str) -> AbstractContextManager[None]:
    """Raise any OSError inside as a StorageError on ``path``; something missing as ObjectNotFoundError.

    A link on the way, or a socket in its place, is a DamagedError: no store puts them there.
    """
    return _Told(path, _reading)


def deleting(path: str) -> AbstractContextManager[None]:
    """Raise any OSError inside as a StorageError on ``path``; something missing as ObjectNotFoundError."""
    return _Told(path, _deleting)


def writing(path: str) -> AbstractContextManager[None]:
    """Raise any OSError inside, none of which can have written ``path`` whole, as a StorageError."""
    return _Told(path, _writing)


def publishing(path: str) -> AbstractContextManager[None]:
    """As ``writing``, around the one step that makes ``path`` visible: a lost answer leaves the outcome unknown."""
    return _Told(path, _publishing)


def published(path: str) -> AbstractContextManager[None]:
    """Raise any OSError inside as StoreOutcomeUnknownError: ``path`` is visible by now, but perhaps not durable."""
    return _Told(path, _published)


def _reading(path: str, error: BaseException) -> None:
    if isinstance(error, StorageError) or not isinstance(error, OSError):
        return
    if error.errno in _MISSING:
        raise ObjectNotFoundError(path) from error
    if error.errno in _NOT_OURS:
        raise DamagedError(path, f"cannot be read: {_why(error)}") from error
    kind = AccessDeniedError if error.errno in _DENIED else StorageError
    raise kind(path, f"could not be read: {_why(error)}") from error


def _deleting(path: str, error: BaseException) -> None:
    if isinstance(error, StorageError) or not isinstance(error, OSError):
        return
    if error.errno in _MISSING:
        raise ObjectNotFoundError(path) from error
    raise _kind(error)(path, f"could not be deleted: {_why(error)}") from error


def _writing(path: str, error: BaseException) -> None:
    if isinstance(error, StorageError) or not isinstance(error, OSError):
        return
    if isinstance(error, FileExistsError):
        raise AlreadyExistsError(path) from error
    raise _kind(error)(path, f"could not be written: {_why(error)}") from error


def _publishing(path: str, error: BaseException) -> None:
    said = error.__cause__ if isinstance(error, StorageError) else error
    if isinstance(said, OSError) and said.errno in _UNSURE:
        raise _unknown(path, said) from said
    _writing(path, error)


def _published(path: str, error: BaseException) -> None:
    if isinstance(error, OSError):
        raise _unknown(path, error) from error


def _kind(error: OSError) -> type[StorageError]:
    if error.errno in _FULL:
        return StorageFullError
    if error.errno in _DENIED:
        return AccessDeniedError
    return BlockedError if error.errno in _BLOCKED else StorageError


def _unknown(path: str, error: OSError) -> StoreOutcomeUnknownError:
    return StoreOutcomeUnknownError(path, f"may or may not have been written: {_why(error)}")


def _why(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symbolic link is in the way, and none is followed below the root. Move it away"
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return "a socket, or a device that there is not, is in its place"
    if error.errno == errno.ENOTDIR:
        return "a file is where a folder should be. Move it away"
    if error.errno == errno.EROFS:
        return (
            "Read-only file system. What is there can be read, with Checkpoint.restore and distckpt.load; a manager needs "
            "one that can be written to"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.strerror}. Make room: `distckpt gc` deletes what dead attempts have left, `distckpt rm` a checkpoint, "
            "and a smaller max_to_keep leaves less. All of them need some 64 KiB: where there is nothing at all, delete "
            "something else first"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{error.strerror} to user {os.geteuid()}. Who saves must be allowed to write to all of the directory; who only "
            "reads, with Checkpoint.restore and distckpt.load, to read it"
        )
    if error.errno == errno.EISDIR:
        return "a folder is where a file should be. Move it away"
    return error.strerror or str(error)
