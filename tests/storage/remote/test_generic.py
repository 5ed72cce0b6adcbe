"""File systems of fsspec's: one that creates exclusively serves as a store, and one that does not is refused."""

from __future__ import annotations

import io
import os
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import fsspec
import pyarrow.fs
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from distckpt.directory.lease import LEASE_SECONDS, HeldLease
from distckpt.directory.leases import Leases
from distckpt.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    StorageError,
    StoreOutcomeUnknownError,
    StoreUnsuitableError,
)
from distckpt.storage import Store, open_store, probe
from distckpt.storage.remote.generic import FsspecStore
from distckpt.testing.conformance import MIB, StoreConformance
from distckpt.testing.observing import Outside, sections_of
from tests.support.checkpoints import commit, new_attempt, put_manifest
from tests.support.clock import Clock
from tests.support.honest import Honest
from tests.support.stores import Files


class LikeAzure(Honest):
    """Another word for it, and an error of another library's."""

    protocol = "likeazure"

    def pipe_file(self, path: str, value: bytes, overwrite: bool = True, **kwargs: Any) -> None:
        try:
            self.publish(path, value, not overwrite)
        except FileExistsError:
            raise RuntimeError("ResourceExists: The specified blob already exists.") from None


class Appearing(io.BytesIO):
    """A file that appears when it is closed, if nobody else's has."""

    def __init__(self, fs: Honest, path: str, once: bool) -> None:
        super().__init__()
        self.fs, self.path, self.once = fs, path, once

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self.fs.publish(self.path, data, self.once)


class OpensOnce(Honest):
    """As file systems of object stores do it: nothing of its own in ``pipe_file``, and ``open`` commits at the end."""

    protocol = "opensonce"
    pipe_file = AbstractFileSystem.pipe_file

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode)
        if not self.place(path).parent.is_dir():
            raise FileNotFoundError(path)
        return Appearing(self, path, mode == "xb")


class Remembers(Honest):
    """Lists from fsspec's own cache, which never ends unless it is told to."""

    protocol = "remembers"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path)
        try:
            return self.dircache[path]
        except KeyError:
            return super().ls(path)


class LooksThenWrites(Honest):
    """As the base class does, in a method of its own."""

    protocol = "looks"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        time.sleep(0.002)
        self.publish(path, value, once=False)


class LooksThenWritesQuickly(Honest):
    """The same, in no time: few rounds of a race show it."""

    protocol = "quickly"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        self.publish(path, value, once=False)


class TakesNoNotice(Honest):
    protocol = "takesnonotice"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.publish(path, value, once=False)


class OpensAtOnce(Honest):
    """As local files and SFTP: exclusive, but seen by all before anything is in it."""

    protocol = "opensatonce"
    pipe_file = AbstractFileSystem.pipe_file


class WritesGradually(Honest):
    protocol = "gradually"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        with self.place(path).open("xb" if mode == "create" else "wb", buffering=0) as file:
            file.write(value[:3])
            time.sleep(0.02)
            file.write(value[3:])


class NeverForgets(Honest):
    """A cache that nobody can tell to forget."""

    protocol = "neverforgets"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        kept = self.__dict__.setdefault("kept", {})
        if path not in kept:
            kept[path] = super().ls(path)
        return list(kept[path])


class OfArrow(ArrowFSWrapper):
    protocol = "ofarrow"

    def __init__(self, base: str, **options: Any) -> None:
        super().__init__(pyarrow.fs.SubTreeFileSystem(base, pyarrow.fs.LocalFileSystem()), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("ofarrow://")


HONEST = (Honest, LikeAzure, OpensOnce, Remembers)
DISHONEST = (
    LooksThenWrites,
    LooksThenWritesQuickly,
    TakesNoNotice,
    OpensAtOnce,
    WritesGradually,
    NeverForgets,
    OfArrow,
)


@pytest.fixture(autouse=True, scope="module")
def _known() -> None:
    for each in (*HONEST, *DISHONEST):
        fsspec.register_implementation(each.protocol, each, clobber=True)


@pytest.mark.parametrize("kind", HONEST)
class TestFsspecStore(StoreConformance):
    @pytest.fixture
    def store(self, kind: type[Honest], tmp_path: Path) -> Store:
        return FsspecStore(f"{kind.protocol}://bucket/run", {"base": str(tmp_path)})

    @pytest.fixture
    def outside(self, tmp_path: Path) -> Outside:
        return Files(tmp_path / "bucket/run")


@pytest.mark.parametrize("kind", DISHONEST)
def test_a_file_system_that_cannot_create_once_is_refused_and_told_what_was_tried(
    kind: type[AbstractFileSystem], tmp_path: Path
) -> None:
    store = open_store(f"{kind.protocol}://bucket/run", {"base": str(tmp_path), "patience": 1})
    with pytest.raises(StoreUnsuitableError, match=f"Tried was .*{kind.__name__}.*Use a directory"):
        probe(store)


def test_a_forked_child_opens_a_file_system_of_its_own(tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Counted(Honest):
        protocol = "counted"

        def __init__(self, base: str, **options: Any) -> None:
            super().__init__(base, **options)
            with made.open("a") as file:
                file.write(f"{os.getpid()}\n")

    fsspec.register_implementation("counted", Counted, clobber=True)
    store = FsspecStore("counted://bucket", {"base": str(tmp_path)})
    store.put_if_absent("a", b"of the parent")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does without
        child = os.fork()
    if child == 0:
        try:
            store.put_if_absent("b", b"of the child")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("b", 100) == b"of the child"
    assert made.read_text().split() == [str(os.getpid()), str(child)]


@pytest.mark.parametrize("kind", [LooksThenWrites, TakesNoNotice, OpensAtOnce])
def test_what_the_probe_wrote_is_gone_after_a_refusal(kind: type[Honest], tmp_path: Path) -> None:
    with pytest.raises(StoreUnsuitableError):
        probe(open_store(f"{kind.protocol}://bucket/run", {"base": str(tmp_path)}))
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


def test_a_scheme_with_another_name_here_and_one_that_is_not_installed_are_refused() -> None:
    with pytest.raises(StoreUnsuitableError, match="write s3://"):
        open_store("s3a://bucket/run")
    with pytest.raises(StoreUnsuitableError, match="Install"):
        open_store("webdav://host/run")


def test_options_go_to_the_file_system_as_they_are(tmp_path: Path) -> None:
    open_store("honest://bucket/run", {"base": str(tmp_path)}).put_if_absent("a", b"x")
    assert (tmp_path / "bucket/run/a").read_bytes() == b"x"
    with pytest.raises(StorageError, match=r"could not be opened: TypeError: .*base"):
        open_store("honest://bucket/run")


class Losing(Honest):
    """Creates, and then says that it does not know; or does nothing, and says so."""

    protocol = "losing"

    def __init__(self, base: str, failures: Any, **options: Any) -> None:
        super().__init__(base, **options)
        self.failures = failures

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        failure = self.failures.pop(0) if self.failures else ""
        if failure.startswith("before"):
            raise {"before": OSError, "before, for good": PermissionError}[failure]("no")
        self.publish(path, value, mode == "create")
        if failure == "after":
            raise ConnectionResetError("lost")


def losing(tmp_path: Path, failures: list[str], patience: float = 30) -> FsspecStore:
    fsspec.register_implementation("losing", Losing, clobber=True)
    store = FsspecStore("losing://bucket", {"base": str(tmp_path), "failures": failures}, patience=patience)
    (tmp_path / "bucket").mkdir(exist_ok=True)
    return store


def test_a_winner_whose_answer_was_lost_has_won(tmp_path: Path) -> None:
    losing(tmp_path, ["after"]).put_if_absent("a", b"ours")
    assert (tmp_path / "bucket/a").read_bytes() == b"ours"


def test_a_loser_whose_answer_was_lost_has_lost(tmp_path: Path) -> None:
    store = losing(tmp_path, ["", "before"])
    store.put_if_absent("a", b"theirs")
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("a", b"ours")
    assert (tmp_path / "bucket/a").read_bytes() == b"theirs"


def test_what_was_not_created_is_created_again(tmp_path: Path) -> None:
    losing(tmp_path, ["before", "before"]).put_if_absent("a", b"ours")
    assert (tmp_path / "bucket/a").read_bytes() == b"ours"


def test_without_an_answer_the_outcome_is_unknown_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(StoreOutcomeUnknownError, match="OSError: no"):
        losing(tmp_path, ["before"] * 20, patience=0.2).put_if_absent("a", b"ours")


def test_a_refusal_for_good_is_not_tried_again(tmp_path: Path) -> None:
    failures = ["before, for good", ""]
    with pytest.raises(StorageError, match="PermissionError: no"):
        losing(tmp_path, failures).put_if_absent("a", b"ours")
    assert failures == [""]


class OverHttp(Honest):
    """Refuses as a web server does, in the words of aiohttp."""

    protocol = "overhttp"

    def __init__(self, base: str, statuses: list[int], **options: Any) -> None:
        super().__init__(base, **options)
        self.statuses = statuses

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if self.statuses:
            asked: Any = SimpleNamespace(real_url=path)
            raise aiohttp.ClientResponseError(asked, (), status=self.statuses.pop(0), message="no")
        self.publish(path, value, mode == "create")


@pytest.mark.parametrize(
    ("status", "kind"),
    [*((status, StorageError) for status in (400, 405, 501, 505)), (401, AccessDeniedError), (403, AccessDeniedError)],
)
def test_a_web_server_that_takes_nothing_is_believed_at_once(
    status: int, kind: type[StorageError], tmp_path: Path
) -> None:
    fsspec.register_implementation("overhttp", OverHttp, clobber=True)
    statuses = [status, 500]
    store = FsspecStore("overhttp://bucket", {"base": str(tmp_path), "statuses": statuses})
    with pytest.raises(StorageError, match=f"could not be created: .*{status}") as caught:
        store.put_if_absent("a", b"ours")
    assert type(caught.value) is kind
    assert statuses == [500]


def test_who_waits_for_a_server_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fsspec.register_implementation("overhttp", OverHttp, clobber=True)
    store = FsspecStore("overhttp://bucket", {"base": str(tmp_path), "statuses": [500, 429, 408]})
    (tmp_path / "bucket").mkdir()
    with caplog.at_level("INFO"):
        store.put_if_absent("a", b"ours")
    assert (tmp_path / "bucket/a").read_bytes() == b"ours"
    levels = [record.levelname for record in caplog.records if "created once more" in record.message]
    assert levels == ["WARNING", "INFO", "INFO"]


class Shortens(Honest):
    protocol = "shortens"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return super().cat_file(path, start, end)[:-1]


def test_a_short_answer_is_no_answer(tmp_path: Path) -> None:
    fsspec.register_implementation("shortens", Shortens, clobber=True)
    store = FsspecStore("shortens://bucket", {"base": str(tmp_path)})
    Files(tmp_path / "bucket").write("a", b"12345")
    with pytest.raises(StorageError, match="5 bytes"):
        store.read("a", 100)
    with pytest.raises(StorageError, match="5 bytes"):
        store.open("a").read_into(0, memoryview(bytearray(5)))


class Buffered(AbstractBufferedFile):
    """A large upload in parts that nobody sees before the last, as of s3fs and its like."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.publish(self.path, b"".join(self.parts), once=False)
        return True

    def discard(self) -> None:
        self.parts = []


class InParts(Honest):
    protocol = "inparts"

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return super()._open(path, mode) if mode == "rb" else Buffered(self, path, mode, block_size=MIB)


def test_an_upload_that_fails_is_never_finished(tmp_path: Path) -> None:
    fsspec.register_implementation("inparts", InParts, clobber=True)
    store = FsspecStore("inparts://bucket", {"base": str(tmp_path)})
    (tmp_path / "bucket").mkdir()
    data = bytes(12 * MIB)

    def produce() -> Iterator[memoryview]:
        yield from list(sections_of(data, 4 * MIB))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_unique("a", len(data), produce())
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []
    assert store.put_unique("a", len(data), sections_of(data, 4 * MIB)).size == len(data)


def test_an_error_of_anybodys_becomes_one_of_ours_and_survives_pickling(tmp_path: Path) -> None:
    store = FsspecStore("honest://bucket", {"base": str(tmp_path)})
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/a").mkdir()
    with pytest.raises(StorageError) as found:
        store.replace("a", b"x")
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


class Timeless(Honest):
    """Does not say when a file was written."""

    protocol = "timeless"

    def described(self, place: Path) -> dict[str, Any]:
        return {name: value for name, value in super().described(place).items() if name != "mtime"}


def test_where_nobody_says_when_a_file_was_written_leases_run_out_all_the_same(tmp_path: Path) -> None:
    fsspec.register_implementation("timeless", Timeless, clobber=True)
    store, clock = FsspecStore("timeless://bucket/run", {"base": str(tmp_path)}), Clock()
    record = put_manifest(store, 1, new_attempt())
    commit(store, record)
    leases = Leases(store, clock)
    HeldLease.take(store, record.attempt, "a reader that is killed", clock=clock)
    assert leases.read().attempts == {record.attempt}
    clock.now += LEASE_SECONDS
    assert leases.read().attempts == frozenset()
