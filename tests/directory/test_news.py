"""Whoever waits for a log to grow hears of it, from the kernel or by looking, whatever becomes of the folder."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distckpt.directory import news as news_module
from distckpt.directory.log import append, prune
from distckpt.directory.news import News, news_of
from distckpt.errors import StorageError
from distckpt.format import names
from distckpt.format.json.log import Entry, State
from distckpt.storage import MemoryStore, ObjectInfo, Store, open_store
from distckpt.storage.around import StoreAround
from distckpt.storage.bell import can_ring
from tests.support.mounts import overlay

FOR_EVER = 3600.0
"""Whoever is not told waits until the test's time is over."""


def grow(store: Store, seq: int) -> None:
    assert append(store, Entry(1, seq, 1, "pin", 1.0, f"{seq:032x}", State(run=1))).outcome == "appended"


@pytest.fixture(params=["told by the kernel", "looking at files", "looking at a URL"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory that does not exist yet."""
    if request.param == "looking at a URL":
        return f"memory://news-{uuid.uuid4().hex}"
    if request.param == "looking at files":
        monkeypatch.setattr(news_module, "can_ring", lambda path: False)
    else:
        monkeypatch.setattr(news_module, "DOUBT_SECONDS", FOR_EVER)
        if not can_ring(str(tmp_path)):
            pytest.skip("the kernel does not tell of everything in this folder")
    return str(tmp_path / "jobs" / "run")


@pytest.fixture
def store(place: str) -> Store:
    return open_store(place)


@pytest.fixture
def news(store: Store) -> Iterator[News]:
    news = news_of(store)
    yield news
    news.close()


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def heard(news: News, pool: ThreadPoolExecutor, store: Store, seq: int) -> int:
    """What somebody who waits already knows once another thread has let the log grow."""
    waiting = pool.submit(news.wait, FOR_EVER)
    grow(store, seq)
    waiting.result()
    return news.newest


def test_a_log_that_grows_is_news_and_the_directory_need_not_be_there(
    news: News, store: Store, elsewhere: ThreadPoolExecutor
) -> None:
    news.wait(FOR_EVER)  # the first call returns at once
    assert news.newest == 0
    assert [heard(news, elsewhere, store, seq) for seq in (1, 2, 3)] == [1, 2, 3]


def test_what_came_while_nobody_waited_is_news_at_once_and_only_once(news: News, store: Store) -> None:
    grow(store, 1)
    news.wait(FOR_EVER)
    for seq in (2, 3):
        grow(store, seq)
    news.wait(FOR_EVER)
    assert news.newest == 3
    news.wait(0)
    assert news.newest == 3


@pytest.mark.parametrize("place", ["looking at a URL"], indirect=True)
def test_a_log_that_has_been_pruned_far_beyond_what_was_known_is_news(news: News, store: Store) -> None:
    grow(store, 1)
    news.wait(FOR_EVER)
    for seq in range(2, 81):
        grow(store, seq)
    prune(store, 80)
    assert store.stat(names.entry_path(2)) is None
    news.wait(FOR_EVER)
    assert news.newest == 80


@pytest.mark.parametrize("place", ["told by the kernel", "looking at files"], indirect=True)
def test_a_directory_that_is_deleted_and_made_anew_is_followed(
    news: News, store: Store, place: str, elsewhere: ThreadPoolExecutor
) -> None:
    for seq in (1, 2):
        grow(store, seq)
    news.wait(FOR_EVER)
    for again in (Path(place), Path(place) / names.LOG):
        waiting = elsewhere.submit(news.wait, FOR_EVER)
        shutil.rmtree(again)
        waiting.result()
        while news.newest:  # it may have been woken in the midst of it
            news.wait(FOR_EVER)
        assert heard(news, elsewhere, open_store(place), 1) == 1


@pytest.mark.parametrize("place", ["told by the kernel", "looking at files"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_was_forked_hears_and_so_does_its_parent(
    news: News, store: Store, place: str, elsewhere: ThreadPoolExecutor
) -> None:
    grow(store, 1)
    news.wait(FOR_EVER)
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        news.wait(0)
        os.write(tell, b"!")
        news.wait(FOR_EVER)
        news.close()
        os._exit(news.newest)
    os.read(ready, 1)
    assert heard(news, elsewhere, open_store(place), 2) == 2
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert heard(news, elsewhere, open_store(place), 3) == 3


def test_close_ends_the_waiting_and_every_thread(news: News, store: Store, elsewhere: ThreadPoolExecutor) -> None:
    before = set(threading.enumerate())
    grow(store, 1)
    news.wait(FOR_EVER)
    waiting = elsewhere.submit(news.wait, FOR_EVER)
    news.close()
    waiting.result()
    news.wait(FOR_EVER)
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("ThreadPool"):
            thread.join()


@pytest.mark.parametrize("place", ["told by the kernel"], indirect=True)
def test_news_that_nobody_closed_end_their_threads_when_they_are_forgotten(store: Store) -> None:
    before = set(threading.enumerate())
    news = news_of(store)
    news.wait(FOR_EVER)
    threads = set(threading.enumerate()) - before
    assert threads
    del news
    for thread in threads:
        thread.join()


class Counted(StoreAround):
    """Counts what is asked of a store; fails while ``broken``."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.asked: Counter[str] = Counter()
        self.broken = False

    def _ask(self, what: str) -> None:
        self.asked[what] += 1
        if self.broken:
            raise StorageError(self.url, "no answer")

    def list(self, folder: str) -> Iterator[ObjectInfo]:
        self._ask("list")
        return super().list(folder)

    def stat(self, path: str) -> ObjectInfo | None:
        self._ask("stat")
        return super().stat(path)

    def read(self, path: str, max_bytes: int) -> bytes:
        self._ask("read")
        return super().read(path, max_bytes)


def test_an_idle_look_at_a_url_is_one_small_request_and_a_listing_comes_with_news_alone() -> None:
    store = Counted(MemoryStore())
    grow(store, 1)
    news = news_of(store)
    news.wait(0)
    news.wait(0)  # the first after a while makes sure that the last known entry is there
    store.asked.clear()
    looks = 5
    for _ in range(looks):
        news.wait(0)
    assert store.asked == {"stat": looks}
    grow(store, 2)
    store.asked.clear()
    news.wait(0)
    assert store.asked == {"stat": 1, "list": 1}


def test_a_store_that_does_not_answer_is_no_news_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    store = Counted(MemoryStore())
    grow(store, 1)
    news = news_of(store)
    store.broken = True
    with caplog.at_level(logging.WARNING):
        news.wait(0)
        news.wait(0)
    assert [record.getMessage() for record in caplog.records] == [
        f"looking whether the log of {store.url} has grown failed: {store.url}: no answer"
    ]
    assert news.newest == 0
    store.broken = False
    news.wait(FOR_EVER)
    assert news.newest == 1


TABLE = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:40 / /mnt/nfs rw,relatime - nfs4 host:/a rw,vers=4.2
41 27 0:41 / /mnt/bucket rw,relatime - fuse.gcsfuse bucket rw
42 27 0:42 / /mnt/host rw,relatime - 9p share rw
43 27 0:43 / /var/lib/container rw - overlay overlay rw,lowerdir=/a,upperdir=/b
44 43 0:44 / /var/lib/container/data rw - xfs /dev/sdb rw
""".splitlines()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/a", True),
        ("/mnt/nfs/run", False),
        ("/mnt/bucket/run", False),
        ("/mnt/host", False),
        ("/var/lib/container/run", False),
        ("/var/lib/container/data/run", True),
    ],
)
def test_the_kernel_is_believed_where_nobody_else_can_write(path: str, told: bool) -> None:
    assert can_ring(path, TABLE) is told
    assert not can_ring(path, [])


def test_a_container_looks_by_itself(tmp_path: Path, elsewhere: ThreadPoolExecutor) -> None:
    with overlay(tmp_path / "seen", tmp_path / "layers") as folder:
        assert not can_ring(str(folder))
        store = open_store(folder / "run")
        news = news_of(store)
        news.wait(0)
        assert heard(news, elsewhere, store, 1) == 1
