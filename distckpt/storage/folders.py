"""Steps from a root down to a folder, one part at a time, so that a symbolic link on the way is refused, not followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


class Folders:
    """An open folder, together with those above it up to the root."""

    def __init__(self, root: str) -> None:
        self._fds = [os.open(root, _FOLDER)]

    @property
    def fd(self) -> int:
        """The descriptor of the innermost folder."""
        return self._fds[-1]

    def enter(self, name: str, *, create: bool) -> None:
        """Step into the folder ``name``, creating it if need be. OSError with ELOOP if it is a symbolic link."""
        try:
            nested = _open_folder(name, self.fd)
        except FileNotFoundError:
            if not create:
                raise
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.fd)
            try:
                nested = _open_folder(name, self.fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=self.fd)
                raise
        self._fds.append(nested)

    def sync(self) -> None:
        """Make the entries of all these folders durable: whoever created one of them may not have done so yet."""
        for fd in reversed(self._fds):
            _sync_folder(fd)

    def prune(self, parts: tuple[str, ...]) -> None:
        """Remove the folders of ``parts`` that have been entered, innermost first, as long as they are empty."""
        entered = self._fds[:-1]
        with contextlib.suppress(OSError):  # not empty, or gone: nobody was promised that the folders go
            for name, above in zip(reversed(parts[: len(entered)]), reversed(entered), strict=True):
                os.rmdir(name, dir_fd=above)

    def close(self) -> None:
        """Close all of them."""
        while self._fds:
            with contextlib.suppress(OSError):  # what counts was synced before, so there is nothing left to lose
                os.close(self._fds.pop())


def visiting(root: str, parts: tuple[str, ...]) -> contextlib.closing[Folders]:
    """The folder ``parts`` below ``root``, open inside a ``with`` block. Raises OSError."""
    return contextlib.closing(open_folders(root, parts))


def open_folders(root: str, parts: tuple[str, ...], *, create: bool = False) -> Folders:
    """The folder ``parts`` below ``root``, open. The root itself must exist. Raises OSError."""
    folders = Folders(root)
    try:
        for name in parts:
            folders.enter(name, create=create)
    except BaseException:
        if create:
            folders.prune(parts)
        folders.close()
        raise
    return folders


def make_root(root: str) -> tuple[str, ...]:
    """Create ``root`` and what is missing above it; what that was, innermost first. Raises OSError."""
    missing, folder = [], root
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(root)
    except FileExistsError:
        pass  # another process was faster; if it is a file, entering it says so
    except BaseException:
        remove_empty(missing)
        raise
    return tuple(missing)


def remove_empty(folders: Iterable[str]) -> None:
    """Remove these folders, innermost first, as long as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or never made
            os.rmdir(folder)


def is_folder(path: str) -> bool:
    """Whether there is a folder now. OSError if that cannot be told, which ``os.path.isdir`` takes for a no."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def sync_way_to(root: str) -> None:
    """Make the entries durable that lead to ``root``, from where its file system begins, whoever made them.

    Raises OSError.
    """
    folder = os.path.realpath(root)
    device = os.stat(folder).st_dev
    while (above := os.path.dirname(folder)) != folder and os.stat(above).st_dev == device:
        with contextlib.suppress(PermissionError):  # who may go through a folder need not be allowed to open it
            fd = os.open(above, _FOLDER)
            try:
                _sync_folder(fd)
            finally:
                os.close(fd)
        folder = above


def _open_folder(name: str, above: int) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise


def _sync_folder(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:  # some network file systems keep entries durable by themselves
            raise
