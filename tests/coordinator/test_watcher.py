"""The watcher actor: workers anywhere in the cluster hear of each entry of a log, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from distckpt.coordinator.client.news import find_news
from distckpt.directory.log import append, read_tail
from distckpt.directory.news import News
from distckpt.format.json.log import Entry, State
from distckpt.storage import Store, open_store
from tests.support.actors import coordinator_pid, end_watcher, watcher, watcher_pid
from tests.support.gang import Gang
from tests.support.small_runs import until

pytestmark = [pytest.mark.usefixtures("connected"), pytest.mark.timeout(150)]

FOR_EVER = 3600.0
"""Whoever is not told waits until the test's time is over."""


@pytest.fixture(scope="module", autouse=True)
def _disconnected() -> Iterator[None]:
    """Of a node that was killed Ray tells on stdout, half a minute later: not where another test reads what is printed."""
    import ray

    yield
    ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield open_store(tmp_path / "run")
    end_watcher(str(tmp_path / "run"))


@pytest.fixture
def news(store: Store) -> Iterator[News]:
    news = find_news(store)
    news.wait(FOR_EVER)
    yield news
    news.close()


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def grow(store: Store) -> int:
    seq = read_tail(store).seq + 1
    assert append(store, Entry(1, seq, 1, "pin", 1.0, f"{seq:032x}", State(run=1))).outcome == "appended"
    return seq


def hears(news: News, pool: ThreadPoolExecutor, store: Store) -> bool:
    """Whether somebody who waits hears what is appended then."""
    waiting = pool.submit(news.wait, FOR_EVER)
    seq = grow(store)
    waiting.result()
    return news.newest == seq


def started(store: Store) -> int:
    """The process of the watcher, once it is there."""
    until(lambda: _pid(store) is not None, 60)
    pid = _pid(store)
    assert pid is not None
    return pid


def _pid(store: Store) -> int | None:
    import ray

    try:
        return watcher_pid(store.url)
    except (ValueError, ray.exceptions.RayActorError):
        return None


def start_on(node: str, store: Store, idle_seconds: float = 600.0) -> int:
    """Start a watcher on that node; its process."""
    from distckpt.coordinator.ray.detached import find_or_start, name_of
    from distckpt.coordinator.ray.watcher import WatcherActor

    find_or_start(WatcherActor, name_of("watcher", store.url), node, store.url, None, idle_seconds)
    return watcher_pid(store.url)


def here() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def test_a_watcher_that_is_killed_comes_back_and_nobody_misses_anything(
    store: Store, news: News, elsewhere: ThreadPoolExecutor
) -> None:
    pid = started(store)
    assert hears(news, elsewhere, store)
    os.kill(pid, signal.SIGKILL)
    assert hears(news, elsewhere, store)
    assert started(store) != pid
    assert hears(news, elsewhere, store)


def test_a_watcher_that_has_ended_is_started_again(store: Store, news: News, elsewhere: ThreadPoolExecutor) -> None:
    import ray

    pid = started(store)
    ray.kill(watcher(store.url), no_restart=True)
    assert hears(news, elsewhere, store)
    with ThreadPoolExecutor(1) as waiting:
        done = waiting.submit(news.wait, FOR_EVER)
        assert started(store) != pid
        grow(store)
        done.result()


def test_storage_is_looked_at_while_the_watcher_stands_still(
    store: Store, news: News, elsewhere: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distckpt.coordinator.ray import watcher as module

    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    pid = started(store)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert hears(news, elsewhere, store)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert hears(news, elsewhere, store)


def test_close_ends_the_waiting(store: Store, news: News, elsewhere: ThreadPoolExecutor) -> None:
    started(store)
    waiting = elsewhere.submit(news.wait, FOR_EVER)
    news.close()
    assert waiting.exception(timeout=60) is None, "it would have waited for ever"


def test_a_watcher_that_nobody_asks_ends_by_itself(store: Store, elsewhere: ThreadPoolExecutor) -> None:
    pid = start_on(here(), store, idle_seconds=0.5)
    assert until(lambda: not runs(pid), 30)
    news = find_news(store)
    news.wait(FOR_EVER)
    assert hears(news, elsewhere, store)
    news.close()


def test_workers_are_told_what_the_coordinator_tells_and_hear_of_a_directory_made_anew(store: Store) -> None:
    import ray

    from distckpt.coordinator.ray.watcher import Teller

    grow(store)
    start_on(here(), store)
    asked = watcher(store.url)
    assert ray.get(asked.newer.remote(0, 60.0)) == 1
    waiting = asked.newer.remote(1, 60.0)
    Teller(store.url).tell(7)  # which is not to be seen on storage yet
    assert ray.get(waiting) == 7
    assert ray.get(asked.newer.remote(7, 0.0)) is None
    waiting = asked.newer.remote(7, 60.0)
    shutil.rmtree(store.url)
    assert ray.get(waiting) == 0


def test_nobody_who_tells_waits_for_a_watcher_that_is_not_there(store: Store) -> None:
    from distckpt.coordinator.ray.watcher import Teller

    teller = Teller(store.url)
    for seq in (1, 2, 3):
        teller.tell(seq)
    with pytest.raises(ValueError, match="watcher"):
        watcher(store.url)


@contextmanager
def another_node(address: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A node more in the cluster: its id, and the process with which all of it goes."""
    import ray

    known = {node["NodeID"] for node in ray.nodes()}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--block", "--num-cpus=1"]
    command += ["--object-store-memory=104857600", "--include-log-monitor=false", "--dashboard-agent-listen-port=0"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    nodes = [start()]

    def is_there() -> bool:
        if not _new(known) and nodes[-1].poll() is not None:  # Ray gives a node 30 s, which a busy machine may need
            nodes.append(start())
        return bool(_new(known))

    try:
        assert until(is_there, 120)
        yield _new(known)[0], nodes[-1]
    finally:
        for node in nodes:
            _end(node)


def _new(known: set[str]) -> list[str]:
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in known]


def _end(node: subprocess.Popen[bytes]) -> None:
    parent = psutil.Process(node.pid) if node.poll() is None else None
    for process in [*parent.children(recursive=True), parent] if parent is not None else []:
        process.kill()
    node.wait()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
@pytest.mark.timeout(300)
def test_workers_go_on_when_the_node_where_the_watcher_lives_is_gone(
    ray_address: str, store: Store, elsewhere: ThreadPoolExecutor
) -> None:
    with another_node(ray_address) as (id, node):
        pid = start_on(id, store)
        news = find_news(store)
        news.wait(FOR_EVER)
        assert hears(news, elsewhere, store)
        _end(node)
        assert until(lambda: not runs(pid), 30)
        assert hears(news, elsewhere, store)  # Ray itself needs some 20 s to find that the node is gone
        assert hears(news, elsewhere, store)
        news.close()


def living_nodes() -> list[str]:
    """Those whose processes are there: Ray itself needs some 20 s to find that one is gone."""
    import ray

    def answers(node: dict[str, Any]) -> bool:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), 10).close()
        except ConnectionRefusedError:
            return False
        return True

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and answers(node)]


def follow(directory: str, until_seq: int) -> list[int]:
    """What a worker hears, one after the other, and until it has heard of ``until_seq`` or later."""
    heard: list[int] = []
    news = find_news(open_store(directory))
    while not heard or heard[-1] < until_seq:
        news.wait(FOR_EVER)
        heard.append(news.newest)
    news.close()
    return heard


def test_workers_on_both_nodes_hear_of_commits_also_when_the_coordinator_was_killed(
    gang2: Gang, tmp_path: Path
) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gang2.run("ranks.saves:hold", directory=str(tmp_path), save_timeout=40)
    nodes = living_nodes()
    assert len(nodes) >= 2
    store = open_store(tmp_path)
    begun = read_tail(store).seq
    remote: Any = ray.remote(num_cpus=0)(follow)
    tasks = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(tmp_path), begun + 3
        )
        for node in nodes
    ]
    started(store)
    os.kill(coordinator_pid(str(tmp_path)), signal.SIGKILL)
    for number in (2, 3):
        assert [each["error"] for each in gang2.run("ranks.saves:held_save", number=number)] == ["", ""]
    newest = read_tail(store).seq
    assert newest >= begun + 3  # a claim and two commits
    for heard in ray.get(tasks):
        assert heard == sorted(set(heard))
        assert begun + 3 <= heard[-1] <= newest
    gang2.run("ranks.saves:release")
    end_watcher(str(tmp_path))
