"""Blocks of remote objects on a disk of this host, which processes fetch for each other.

Each user has a folder of his own in the directory that he gives: a folder for each object, in that a file for each block,
its bytes and then the CRC32C of each page of them. A block is fetched into a file beside it, of which whoever fetches holds
the lock, and renamed: who dies leaves nothing that would be taken for a block, and no lock. Whoever has an object open
holds a shared lock on its folder, and nobody deletes from one that is locked. Nothing is flushed: a block that a crash has
spoiled does not have its checksums.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator

import crc32c
import numpy as np

from distckpt.storage.remote.budget import CONNECTIONS, Budget

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
"""What is fetched at a time: whoever wants a byte of a block fetches all of it, for himself and for the others."""

CACHE_BYTES = 64 << 30
"""So much a cache holds unless another limit is given."""

WAIT_SECONDS = 60.0
"""How long somebody else is waited for who fetches a block: he may have been stopped."""

_PAGE = 1 << 18
_CRC = np.dtype("<u4")
_LOCK_SECONDS = 5.0
_FULL_SECONDS = 10.0
_LONGEST_PAUSE = 0.02
_TRIES = 8
_USAGE = "usage"
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class BlockCache:
    """At most ``limit`` bytes in the user's folder below ``directory``. Raises nothing: what cannot be kept is not.

    The folder is for the user alone. If it cannot be made so, or not be written any more, that is logged once.
    """

    def __init__(self, directory: str, limit: int = CACHE_BYTES) -> None:
        self.folder = os.path.join(directory, f"distckpt-{os.geteuid()}")
        self.fetching = Budget(CONNECTIONS)
        self._limit = limit
        self._full_until = 0.0
        self._is_usable: bool | None = None
        self._takes_more = True

    def entry(self, key: str, *, anew: bool = True) -> Entry | None:
        """The place for blocks of the object that ``key`` names for ever, made ``anew`` if there is none.

        None if there is none, or can be none.
        """
        if not self._made():
            return None
        path = os.path.join(self.folder, hashlib.sha256(key.encode()).hexdigest()[:32])
        for _ in range(_TRIES):
            folder = -1
            try:
                with contextlib.suppress(FileExistsError):
                    if anew:
                        os.mkdir(path, 0o700)
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
                if _locked(folder, fcntl.LOCK_SH, _LOCK_SECONDS) and _is_at(path, folder):
                    return Entry(self, folder)
            except FileNotFoundError:  # somebody makes room just now, or has deleted it all
                if not anew:
                    break
                self._is_usable = self._make()
            except OSError as error:
                self.give_up(error)
            if folder >= 0:
                _let_go(folder)
        return None

    def has_room(self, part: int, nbytes: int) -> bool:
        """Whether the file ``part`` may be made so long, and is now. What nobody has open makes room, oldest first."""
        if not self._takes_more or time.monotonic() < self._full_until:
            return False
        try:
            usage = os.open(os.path.join(self.folder, _USAGE), os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
            try:
                return _locked(usage, fcntl.LOCK_EX, _LOCK_SECONDS) and self._reserve(usage, part, nbytes)
            finally:
                _let_go(usage)
        except OSError as error:
            self.give_up(error)
            return False

    def give_up(self, error: OSError) -> None:
        """Keep nothing more, after a failure of the disk. That something was deleted is none."""
        if self._takes_more and not isinstance(error, FileNotFoundError):
            self._takes_more = False
            logger.warning("%s takes no more, and downloads are not kept: %s", self.folder, error.strerror or error)

    def _made(self) -> bool:
        """Whether the folder is there, and the user's alone; found out once."""
        if self._is_usable is None:
            self._is_usable = self._make()
        return self._is_usable

    def _make(self) -> bool:
        try:
            os.makedirs(os.path.dirname(self.folder), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder, 0o700)
            found = os.lstat(self.folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise PermissionError("it is no folder that is yours alone (mode 0700)")
        except OSError as error:
            logger.warning("%s cannot be used as a cache, and everything is downloaded: %s", self.folder, error)
            return False
        return True

    def _reserve(self, usage: int, part: int, nbytes: int) -> bool:
        said = os.pread(usage, 32, 0).strip()
        used = int(said) if said.isdigit() else self._swept(self._limit)
        if used + nbytes > self._limit:
            used = self._swept(self._limit - max(nbytes, self._limit // 10))
        fits = used + nbytes <= self._limit
        if not fits:
            self._full_until = time.monotonic() + _FULL_SECONDS
        # Counted before it is written: whoever dies in between leaves too high a number, until somebody counts again.
        os.pwrite(usage, b"%-20d\n" % (used + nbytes if fits else used), 0)
        if fits:
            os.ftruncate(part, nbytes)  # so that whoever counts meanwhile sees it
        return fits

    def _swept(self, most: int) -> int:
        """How many bytes are there, after objects were deleted until there are at most so many, if they can be."""
        found = sorted(map(_look, self._objects()), key=lambda one: one[1])
        used = sum(size for size, _, _ in found)
        for size, _, path in found:
            if used <= most:
                break
            if _deleted(path):
                used -= size
        return used

    def _objects(self) -> Iterator[str]:
        with os.scandir(self.folder) as entries:
            yield from (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))


class Entry:
    """The blocks of one object, open in this process: they are not deleted to make room. For many threads."""

    def __init__(self, cache: BlockCache, folder: int) -> None:
        self._cache = cache
        self._folder = folder

    def read(
        self, number: int, size: int, first: int, target: memoryview, fetch: Callable[[memoryview], object]
    ) -> None:
        """Fill ``target`` with what block ``number``, of ``size`` bytes, has from ``first`` on.

        If it is not there, ``fetch`` fills memory with all of it, in one process at a time. Raises what that raises.
        """
        if self._kept(number, size, first, target):
            return
        with self._claim(number) as part:
            if self._kept(number, size, first, target):  # somebody else has fetched it meanwhile
                return
            with self._cache.fetching.request():  # as many blocks are in memory at once as there are connections
                whole = target if target.nbytes == size else memoryview(bytearray(size))
                fetch(whole)
                if part is not None:
                    self._keep(number, part, whole)
                if whole is not target:
                    target[:] = whole[first : first + target.nbytes]

    def drop(self) -> None:
        """Have nothing kept of the object."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                self._remove(name)

    def close(self) -> None:
        """Let others delete it. Closing twice does no harm."""
        if self._folder >= 0:
            _let_go(self._folder)
            self._folder = -1

    def _kept(self, number: int, size: int, first: int, target: memoryview) -> bool:
        """Whether the block was there, as it was kept."""
        try:
            file = os.open(str(number), os.O_RDONLY | _FLAGS, dir_fd=self._folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._cache.give_up(error)
            return False
        try:
            is_good = os.fstat(file).st_size == size + _CRC.itemsize * _pages(size) and _filled(
                file, size, first, target
            )
            if is_good:
                os.utime(file)  # what was not used for longest goes first
        except OSError:
            is_good = False
        finally:
            os.close(file)
        if not is_good:
            logger.warning("%s: a block is not as it was kept, and is fetched again", self._cache.folder)
            self._remove(str(number))
        return is_good

    @contextlib.contextmanager
    def _claim(self, number: int) -> Iterator[int | None]:
        """The file to fetch a block into, locked; None if somebody else has fetched it, or one can wait no longer."""
        name = f"{number}.part"
        part, is_mine = -1, False
        try:
            for _ in range(_TRIES):
                part = os.open(name, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600, dir_fd=self._folder)
                is_mine = _locked(part, fcntl.LOCK_EX, WAIT_SECONDS, lambda: self._is_there(str(number)))
                if not is_mine or _is_at(name, part, self._folder):
                    break
                _let_go(part)  # it has become the block, or was deleted
                part, is_mine = -1, False
        except OSError as error:
            self._cache.give_up(error)
        try:
            yield part if is_mine else None
        finally:
            if part >= 0:
                if is_mine and _is_at(name, part, self._folder):
                    self._remove(name)
                _let_go(part)

    def _keep(self, number: int, part: int, whole: memoryview) -> None:
        crcs = [crc32c.crc32c(whole[begin : begin + _PAGE]) for begin in range(0, whole.nbytes, _PAGE)]
        table = np.array(crcs, dtype=_CRC).tobytes()
        if not self._cache.has_room(part, whole.nbytes + len(table)):
            return
        try:
            for piece, position in ((whole, 0), (memoryview(table), whole.nbytes)):
                while piece.nbytes:
                    count = os.pwrite(part, piece, position)
                    piece, position = piece[count:], position + count
            os.rename(f"{number}.part", str(number), src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError as error:
            self._cache.give_up(error)

    def _is_there(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder)


def _pages(size: int) -> int:
    return -(-size // _PAGE)


def _filled(file: int, size: int, first: int, target: memoryview) -> bool:
    """Whether ``target`` has been filled from a block, and every page that it took from is what was kept."""
    crcs = np.frombuffer(os.pread(file, _CRC.itemsize * _pages(size), size), dtype=_CRC)
    last = first + target.nbytes
    scratch = memoryview(bytearray(_PAGE))
    for number in range(first // _PAGE, _pages(last)):
        begin, end = number * _PAGE, min((number + 1) * _PAGE, size)
        is_all_wanted = first <= begin and end <= last
        page = target[begin - first : end - first] if is_all_wanted else scratch[: end - begin]
        if os.preadv(file, [page], begin) != end - begin or crc32c.crc32c(page) != int(crcs[number]):
            return False
        if not is_all_wanted:
            low, high = max(begin, first), min(end, last)
            target[low - first : high - first] = page[low - begin : high - begin]
    return True


def _look(path: str) -> tuple[int, float, str]:
    """How many bytes an object has here, when it was last used, and ``path``."""
    size, used = 0, 0.0
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as blocks:
        for block in blocks:
            with contextlib.suppress(FileNotFoundError):
                found = block.stat(follow_symlinks=False)
                size, used = size + found.st_size, max(used, found.st_mtime)
    return size, used, path


def _deleted(path: str) -> bool:
    """Delete an object, unless somebody has it open."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(folder):
            os.unlink(name, dir_fd=folder)
        os.rmdir(path)
    except OSError:
        return False
    finally:
        _let_go(folder)
    return True


def _locked(file: int, kind: int, seconds: float, is_done: Callable[[], bool] = bool) -> bool:
    """Whether the lock was got within so many seconds. False as soon as ``is_done``, if that is not before."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_done() or time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            return True


def _let_go(file: int) -> None:
    """Close a file and end its lock, also if a child was forked meanwhile, which has it open too."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _is_at(name: str, file: int, folder: int | None = None) -> bool:
    """Whether that file is what has this name."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file))


_caches: dict[tuple[str, int], BlockCache] = {}


def cache_in(directory: str, limit: int) -> BlockCache:
    """The cache there, the same for all stores of this process."""
    key = directory, limit
    if key not in _caches:
        _caches[key] = BlockCache(directory, limit)
    return _caches[key]
