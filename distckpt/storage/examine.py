"""Is a place fit for checkpoints, and how fast is it? Everything is tried in a folder of its own, which is gone at the end."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import crc32c

from distckpt.errors import (
    AlreadyExistsError,
    DamagedError,
    DistckptError,
    StorageError,
    StorageFullError,
    StoreUnsuitableError,
)
from distckpt.storage.folders import remove_empty
from distckpt.storage.interface import Store, SupportsCooling
from distckpt.storage.location import canonical, join, open_store
from distckpt.storage.mounts import mount_of
from distckpt.storage.probe import FOLDER, probe
from distckpt.terminal.sizes import human_bytes

Verdict = Literal["good", "bad", "careful", "untried"]

CLOCKS_SECONDS = 60.0
"""By how much clocks may differ before it is worth a word. Nothing is deleted by them."""

ROUNDS, _ROUNDS_SECONDS = 20, 4.0
FIRST_BYTES, MOST_BYTES = 8 << 20, 256 << 20
_TRANSFER_SECONDS = 4.0
_PIECE = 8 << 20
_STREAMS = 16
_PATIENCE = 30.0
_PASSING = {
    "tmpfs": "it is in memory: all is lost when this host goes down",
    "ramfs": "it is in memory: all is lost when this host goes down",
    "overlay": "it belongs to a container, and is gone with it",
}
_ROOM = 1 << 30
_FEW_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: ``what``, how it is, in words, and what to do about it if it is not good."""

    what: str
    verdict: Verdict
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Speed:
    """In seconds: a small object created, median and worst, and read; in bytes a second: a large one. None: not known."""

    create: float | None = None
    create_worst: float | None = None
    read: float | None = None
    read_worst: float | None = None
    up: float | None = None
    down: float | None = None

    def save_seconds(self, nbytes: int) -> float | None:
        """About how long a save of so many bytes from this host takes: shards, then index, manifest and log entry."""
        if not self.up or self.create is None:
            return None
        return nbytes / self.up + 3 * self.create


@dataclass(frozen=True, slots=True)
class Examination:
    """``is_safe`` is None if it could not be tried."""

    url: str
    findings: tuple[Finding, ...]
    speed: Speed
    is_safe: bool | None


def examine(
    url: str, storage_options: Mapping[str, Any] | None = None, tell: Callable[[Finding], object] = bool
) -> Examination:
    """Try at ``url``, which need not exist yet, all that saving there depends on. ``tell`` hears each finding at once.

    It takes some twenty seconds at most where the store answers, and writes some hundred MiB at most. Nothing is left
    behind, whatever happens. ValueError for what is no URL, or for an option that is not known.
    """
    location = canonical(url)
    findings: list[Finding] = []

    def note(finding: Finding) -> None:
        findings.append(finding)
        tell(finding)

    with _own_folder(location) as folder:
        if "://" not in location:
            for finding in _file_system(location):
                note(finding)
        try:
            trial = _Trial(open_store(folder, _hurried(location, storage_options)), note)
        except DistckptError as error:
            note(
                Finding(
                    "opening", "untried", str(error), "see that the URL is right, and that what it needs is installed"
                )
            )
            return Examination(location, tuple(findings), Speed(), None)
        try:
            is_safe = trial.run()
        finally:
            trial.clean_up()
    return Examination(location, tuple(findings), trial.speed, is_safe)


def _hurried(location: str, storage_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The options, with less patience than a job has for a store that does not answer, unless they say something else."""
    is_far = "://" in location and not location.startswith("memory:")
    return {**({"patience": _PATIENCE} if is_far else {}), **(storage_options or {})}


# ---- a local path ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _own_folder(location: str) -> Iterator[str]:
    """Where to try, which nobody else uses; of a local path all is removed that had to be made."""
    folder = join(location, f"distckpt-doctor-{uuid.uuid4().hex}")
    missing, above = [folder], location
    while "://" not in location and not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    try:
        yield folder
    finally:
        if "://" not in location:
            remove_empty([join(folder, FOLDER), *missing])


def _file_system(location: str) -> Iterator[Finding]:
    mount = mount_of(os.path.realpath(location))
    if mount is None:
        yield Finding("file system", "careful", "the system does not say which one it is")
    else:
        shown = f"{mount.kind} at {mount.point}, {','.join(dict.fromkeys(mount.options))}"
        if mount.kind in _PASSING:
            yield Finding("file system", "careful", shown, _PASSING[mount.kind])
        elif mount.seconds_behind:
            yield Finding(
                "file system",
                "careful",
                shown,
                f"other hosts may see what is committed {mount.seconds_behind} s late; mounted with actimeo=0 or noac, at once",
            )
        else:
            yield Finding("file system", "good", shown)
    there = location
    while not os.path.exists(there):
        there = os.path.dirname(there)
    try:
        room = os.statvfs(there)
    except OSError as error:
        yield Finding("room", "untried", str(error))
        return
    free, files = room.f_bavail * room.f_frsize, room.f_favail
    shown = f"{human_bytes(free)} and {files:,} files" if room.f_files else human_bytes(free)
    if free < _ROOM or (room.f_files > 0 and files < _FEW_FILES):
        yield Finding("room", "careful", f"{shown} are left", "hardly any: a save that finds none fails")
    else:
        yield Finding("room", "good", f"{shown} are left")


# ---- any store ------------------------------------------------------------------------------------------------------


_Found = tuple[Verdict, str, str]
"""As the last three of a Finding."""


class _Trial:
    """Tries one store, in whose root is nothing but what this makes."""

    def __init__(self, store: Store, note: Callable[[Finding], object]) -> None:
        self._store = store
        self._note = note
        self._made: set[str] = set()
        self.speed = Speed()

    def run(self) -> bool | None:
        """Whether it is safe; None if it could not be tried."""
        try:
            self._put("first", b"x")
        except StoreUnsuitableError as error:
            self._note(Finding("exclusive create", "bad", str(error), "save elsewhere"))
            return False
        except (StorageError, DamagedError) as error:
            self._note(
                Finding("writing", "untried", str(error), "nothing can be told before this host may write there")
            )
            return None
        if "://" not in self._store.url:
            self._step("flush", self._flush)
        is_safe = self._step("exclusive create, race of writers, list after write", self._probe)
        is_safe &= self._step("clock", self._clock)
        is_safe &= self._step("ranges and checksums", self._ranges)
        is_safe &= self._step("latency", self._latency)
        return is_safe & self._step("throughput", self._transfers)

    def clean_up(self) -> None:
        """Delete all that was made, and what the probe may have left."""
        with contextlib.suppress(StorageError, DamagedError):
            self._made |= {info.path for info in self._store.list(FOLDER)}
        for path in self._made:
            with contextlib.suppress(StorageError, DamagedError):
                self._store.delete(path)

    def _step(self, what: str, step: Callable[[], _Found]) -> bool:
        try:
            verdict, found, advice = step()
        except StorageFullError as error:
            verdict, found, advice = "careful", str(error), "make room: a save that finds none fails"
        except (StorageError, DamagedError) as error:
            verdict, found, advice = "bad", str(error), "save elsewhere, or see why this failed and try again"
        self._note(Finding(what, verdict, found, advice))
        return verdict != "bad"

    def _flush(self) -> _Found:
        path = os.path.join(self._store.url, "flushed")
        self._made.add("flushed")
        try:
            with open(path, "wb", buffering=0) as file:

                def write(number: int) -> None:
                    file.write(b"x" * 4096)
                    os.fsync(file.fileno())

                seconds = _timed(write)
        except OSError as error:
            raise StorageError(path, str(error)) from error
        shown = f"{_ms(statistics.median(seconds))} until 4 KiB are on the disk, {_ms(max(seconds))} at worst"
        return "good", f"{shown}; hard links are there", ""

    def _probe(self) -> _Found:
        try:
            probe(self._store)
        except StoreUnsuitableError as error:
            return "bad", str(error), "save elsewhere: here one writer might undo what another one has committed"
        return "good", "of several writers one wins, and what is there is shown at once", ""

    def _clock(self) -> _Found:
        before = time.time()
        self._put("clock", b"x")
        after = time.time()
        info = self._store.stat("clock")
        if info is None:
            return "bad", "what was written is not there", "save elsewhere"
        if not info.modified:
            return "good", "the store does not say when something was written", ""
        offset = info.modified - (before + after) / 2
        if abs(offset) < max(1.5, after - before):  # many servers tell their time in whole seconds
            return "good", "that of the store is ours", ""
        ahead = f"that of the store is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} ours"
        if abs(offset) < CLOCKS_SECONDS:
            return "good", ahead, ""
        return "careful", ahead, "set the clocks: nothing is deleted by them, but times in listings are wrong"

    def _ranges(self) -> _Found:
        data = os.urandom(_PIECE // 4) * 4 + b"end"
        crc = crc32c.crc32c(data)
        self._made.add("ranges")
        info = self._store.put_unique("ranges", len(data), [memoryview(data)])
        if info.size != len(data) or info.crc32c not in (None, crc):
            return "bad", "the store holds something else than was sent", "save elsewhere"
        with contextlib.closing(self._store.open("ranges")) as source:
            for begin, end in ((0, 1), (4095, 4097), (_PIECE // 3, _PIECE // 2), (len(data) - 3, len(data))):
                target = bytearray(end - begin)
                source.read_into(begin, memoryview(target))
                if target != data[begin:end]:
                    return "bad", "a range has other bytes than were sent", "save elsewhere"
        return "good", f"the store keeps {'no ' if info.crc32c is None else ''}CRC32C itself; readers compare ours", ""

    def _latency(self) -> _Found:
        creates = _timed(lambda number: self._put(f"small-{number}", b"x" * 1000))
        reads = _timed(lambda number: self._store.read("small-0", 1000))
        create, read = statistics.median(creates), statistics.median(reads)
        self.speed = Speed(create, max(creates), read, max(reads))
        shown = f"{_ms(create)} to create a small object, {_ms(max(creates))} at worst; {_ms(read)} and {_ms(max(reads))} to read"
        return "good", shown, ""

    def _transfers(self) -> _Found:
        """A first object says how large the second one may be."""
        up = self._sent("large-0", FIRST_BYTES)
        size = min(MOST_BYTES, int(up * _TRANSFER_SECONDS)) // _PIECE * _PIECE
        path = "large-0"
        if size > 2 * FIRST_BYTES:
            path = "large-1"
            up = self._sent(path, size)
        down = self._received(path)
        known = self.speed
        self.speed = Speed(known.create, known.create_worst, known.read, known.read_worst, up, down)
        return "good", f"{human_bytes(round(up))}/s up, {human_bytes(round(down))}/s down", ""

    def _put(self, path: str, data: bytes) -> None:
        self._made.add(path)
        try:
            self._store.put_if_absent(path, data)
        except AlreadyExistsError as error:
            raise StoreUnsuitableError(
                self._store.url, f"a name that nobody has used is said to be taken: {error}"
            ) from error

    def _sent(self, path: str, size: int) -> float:
        """Bytes a second."""
        section = memoryview(os.urandom(_PIECE))
        self._made.add(path)
        began = time.perf_counter()
        self._store.put_unique(path, size, (section for _ in range(size // _PIECE)))
        return size / max(1e-9, time.perf_counter() - began)

    def _received(self, path: str) -> float:
        if isinstance(self._store, SupportsCooling):
            self._store.cool(path)  # not what memory keeps of it
        streams = _STREAMS if "://" in self._store.url else 2
        with contextlib.closing(self._store.open(path)) as source, ThreadPoolExecutor(streams) as pool:
            began = time.perf_counter()
            list(
                pool.map(lambda at: source.read_into(at, memoryview(bytearray(_PIECE))), range(0, source.size, _PIECE))
            )
            return source.size / max(1e-9, time.perf_counter() - began)


def _timed(once: Callable[[int], object]) -> list[float]:
    """Seconds for each of some calls, as many as there is time for."""
    seconds: list[float] = []
    while len(seconds) < ROUNDS and sum(seconds) < _ROUNDS_SECONDS:
        began = time.perf_counter()
        once(len(seconds))
        seconds.append(time.perf_counter() - began)
    return seconds


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"
