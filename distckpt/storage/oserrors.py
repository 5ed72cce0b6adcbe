"""The operating system's refusals, in the words of distckpt.errors."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from distckpt.errors import (
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


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise any OSError inside as a StorageError on ``path``; something missing as ObjectNotFoundError.

    A link on the way, or a socket in its place, is a DamagedError: no store puts them there.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _MISSING:
            raise ObjectNotFoundError(path) from error
        if error.errno in _NOT_OURS:
            raise DamagedError(path, f"cannot be read: {_why(error)}") from error
        raise StorageError(path, f"could not be read: {_why(error)}") from error


@contextlib.contextmanager
def deleting(path: str) -> Iterator[None]:
    """Raise any OSError inside as a StorageError on ``path``; something missing as ObjectNotFoundError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _MISSING:
            raise ObjectNotFoundError(path) from error
        kind = BlockedError if error.errno in _BLOCKED else StorageError
        raise kind(path, f"could not be deleted: {_why(error)}") from error


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Raise any OSError inside, none of which can have written ``path`` whole, as a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except FileExistsError as error:
        raise AlreadyExistsError(path) from error
    except OSError as error:
        raise _kind(error)(path, f"could not be written: {_why(error)}") from error


@contextlib.contextmanager
def publishing(path: str) -> Iterator[None]:
    """As ``writing``, around the one step that makes ``path`` visible: a lost answer leaves the outcome unknown."""
    try:
        with writing(path):
            yield
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _UNSURE:
            raise _unknown(path, error.__cause__) from error.__cause__
        raise


@contextlib.contextmanager
def published(path: str) -> Iterator[None]:
    """Raise any OSError inside as StoreOutcomeUnknownError: ``path`` is visible by now, but perhaps not durable."""
    try:
        yield
    except OSError as error:
        raise _unknown(path, error) from error


def _kind(error: OSError) -> type[StorageError]:
    if error.errno in _FULL:
        return StorageFullError
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
            f"{error.strerror}. Make room: `distckpt gc` deletes what dead attempts have left, and a smaller max_to_keep "
            "leaves less"
        )
    if error.errno == errno.EISDIR:
        return "a folder is where a file should be. Move it away"
    return error.strerror or str(error)
