"""A FUSE file system that shows a folder, and lacks what some file systems lack. It needs no library.

``python -m tests.support.fuse FD FOLDER KEPT LINKS`` serves what is mounted with ``FD``, in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gang import ROOT

_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_MAX_WRITE = 1 << 17
_NAMES = {
    1: "lookup", 3: "getattr", 4: "setattr", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename", 13: "link", 14: "open",
    15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync", 25: "flush", 26: "init", 27: "opendir", 28: "readdir",
    29: "releasedir", 30: "fsyncdir", 35: "create", 45: "rename2",
}  # fmt: skip
_FORGET, _BATCH_FORGET, _INTERRUPT = 2, 42, 36


@contextmanager
def showing(shown: Path, folder: Path, *, kept: int = 0, links: bool = True) -> Iterator[Path]:
    """``shown`` at ``folder``, which is created. The kernel keeps names, missing ones too, for ``kept`` seconds, as of NFS.

    Without ``links`` hard ones are refused with EPERM, as by BeeGFS.
    """
    folder.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other".encode()
        if ctypes.CDLL(None, use_errno=True).mount(b"shown", bytes(folder), b"fuse.shown", 0, options) != 0:
            pytest.skip("mounting is not permitted here")
        command = [sys.executable, "-m", "tests.support.fuse", str(fd), str(shown), str(kept), str(int(links))]
        with subprocess.Popen(command, pass_fds=[fd], cwd=ROOT) as server:
            try:
                yield folder
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True)
                server.kill()
    finally:
        os.close(fd)


class Shown:
    """Answers to what the kernel asks. A node is a file, whatever it is called: its number is its place in ``paths``.

    What takes the place of another file is another node: the kernel would mix what it keeps of the two.
    """

    def __init__(self, root: str, kept: int, links: bool) -> None:
        self.root, self.kept, self.links = root, kept, links
        self.paths = ["", "."]
        self.inodes = [0, os.lstat(root).st_ino]
        self.known = {self.inodes[1]: 1}
        self.opened: dict[int, list[int]] = {}

    def path(self, node: int, name: bytes = b"") -> str:
        return os.path.normpath(os.path.join(self.root, self.paths[node], os.fsdecode(name)))

    def entry(self, node: int, name: bytes) -> bytes:
        path = os.path.normpath(os.path.join(self.paths[node], os.fsdecode(name)))
        try:
            got = os.lstat(os.path.join(self.root, path))
        except FileNotFoundError:
            if not self.kept:
                raise
            return struct.pack("<QQQQII", 0, 0, self.kept, 0, 0, 0) + bytes(
                _ATTR.size
            )  # that it is missing is kept too
        number = self.known.setdefault(got.st_ino, len(self.paths))
        if number == len(self.paths):
            self.paths.append(path)
            self.inodes.append(got.st_ino)
        self.paths[number] = path
        return struct.pack("<QQQQII", number, 0, self.kept, self.kept, 0, 0) + self.packed(got)

    def attributes(self, node: int) -> bytes:
        """Of the file itself: something else may have its name by now."""
        try:
            got = os.lstat(self.path(node))
        except FileNotFoundError:
            got = None
        if got is None or got.st_ino != self.inodes[node]:
            fds = self.opened.get(node)
            if not fds:
                raise OSError(errno.ESTALE, "another file has its name")
            got = os.fstat(fds[0])
        return self.packed(got)

    def forget(self, path: str, kept: int = 0) -> None:
        """A name is about to go, for a file of inode ``kept`` perhaps: the number of its last file will mean no other."""
        with contextlib.suppress(FileNotFoundError):
            got = os.lstat(path)
            if got.st_ino != kept and (got.st_nlink == 1 or os.path.isdir(path)):
                self.known.pop(got.st_ino, None)

    def opening(self, node: int, fd: int) -> int:
        if os.fstat(fd).st_ino != self.inodes[node]:
            os.close(fd)
            raise OSError(errno.ESTALE, "another file has its name")
        self.opened.setdefault(node, []).append(fd)
        return fd

    def packed(self, got: os.stat_result) -> bytes:
        seconds = [int(each) for each in (got.st_atime, got.st_mtime, got.st_ctime)]
        nanos = [each % 1_000_000_000 for each in (got.st_atime_ns, got.st_mtime_ns, got.st_ctime_ns)]
        return _ATTR.pack(got.st_ino, got.st_size, got.st_blocks, *seconds, *nanos, got.st_mode, got.st_nlink, got.st_uid,
                          got.st_gid, 0, got.st_blksize, 0)  # fmt: skip

    def do_init(self, node: int, body: bytes) -> bytes:
        return struct.pack("<IIIIHHII", 7, 31, 1 << 20, 0, 12, 10, _MAX_WRITE, 1) + bytes(36)

    def do_lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(node, body[:-1])

    def do_getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", self.kept, 0, 0) + self.attributes(node)

    def do_setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if valid & 8:
            os.truncate(self.path(node), size)
        return self.do_getattr(node, b"")

    def do_mkdir(self, node: int, body: bytes) -> bytes:
        os.mkdir(self.path(node, body[8:-1]))
        return self.entry(node, body[8:-1])

    def do_unlink(self, node: int, body: bytes) -> bytes:
        self.forget(self.path(node, body[:-1]))
        os.unlink(self.path(node, body[:-1]))
        return b""

    def do_rmdir(self, node: int, body: bytes) -> bytes:
        self.forget(self.path(node, body[:-1]))
        os.rmdir(self.path(node, body[:-1]))
        return b""

    def do_rename(self, node: int, body: bytes, skip: int = 8) -> bytes:
        target, (old, new) = struct.unpack_from("<Q", body)[0], body[skip:-1].split(b"\0")
        before, after = self.path(node, old), self.path(target, new)
        moved = os.lstat(before).st_ino
        self.forget(after, moved)
        os.replace(before, after)
        if moved in self.known:
            self.paths[self.known[moved]] = os.path.relpath(after, self.root)
        return b""

    def do_rename2(self, node: int, body: bytes) -> bytes:
        return self.do_rename(node, body, 16)

    def do_link(self, node: int, body: bytes) -> bytes:
        if not self.links:
            raise PermissionError(errno.EPERM, "no hard links here")
        os.link(self.path(struct.unpack_from("<Q", body)[0]), self.path(node, body[8:-1]))
        return self.entry(node, body[8:-1])

    def do_open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0] & ~(os.O_NOFOLLOW | os.O_DIRECT)
        return struct.pack("<QII", self.opening(node, os.open(self.path(node), flags)), 0, 0)

    def do_create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        fd = os.open(self.path(node, body[16:-1]), flags & ~os.O_DIRECT, mode)
        entry = self.entry(node, body[16:-1])
        self.opening(struct.unpack_from("<Q", entry)[0], fd)
        return entry + struct.pack("<QII", fd, 0, 0)

    def do_read(self, node: int, body: bytes) -> bytes:
        fd, position, size = struct.unpack_from("<QQI", body)
        return os.pread(fd, size, position)

    def do_write(self, node: int, body: bytes) -> bytes:
        fd, position, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(fd, body[40 : 40 + size], position), 0)

    def do_release(self, node: int, body: bytes) -> bytes:
        fd = struct.unpack_from("<Q", body)[0]
        self.opened[node].remove(fd)
        os.close(fd)
        return b""

    def do_flush(self, node: int, body: bytes) -> bytes:
        return b""

    def do_fsync(self, node: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def do_statfs(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0)

    def do_opendir(self, node: int, body: bytes) -> bytes:
        fd = self.opening(node, os.open(self.path(node), os.O_RDONLY | os.O_DIRECTORY))
        return struct.pack("<QII", fd, 0, 0)

    do_releasedir, do_fsyncdir = do_release, do_fsync

    def do_readdir(self, node: int, body: bytes) -> bytes:
        _, position, size = struct.unpack_from("<QQI", body)
        out = b""
        for place, name in enumerate(sorted(os.listdir(self.path(node)))):
            encoded = os.fsencode(name)
            item = struct.pack("<QQII", place + 2, place + 1, len(encoded), 0) + encoded
            item += bytes(-len(item) % 8)
            if place >= position:
                if len(out) + len(item) > size:
                    break
                out += item
        return out


def serve(fd: int, shown: Shown) -> None:
    """Until the file system is unmounted."""
    while True:
        try:
            asked = os.read(fd, _MAX_WRITE + 4096)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            return
        _, code, unique, node = _IN.unpack_from(asked)[:4]
        if code in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            continue
        answer: Callable[[int, bytes], bytes] | None = getattr(shown, f"do_{_NAMES.get(code, '')}", None)
        body, failed = b"", errno.ENOSYS
        if answer is not None:
            try:
                body, failed = answer(node, asked[_IN.size :]), 0
            except OSError as error:
                failed = error.errno or errno.EIO
        os.write(fd, _OUT.pack(_OUT.size + len(body), -failed, unique) + body)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Shown(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"))
