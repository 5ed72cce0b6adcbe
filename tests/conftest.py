"""Shared by all tests: one Ray cluster of two nodes, and gangs of rank processes that live for the whole session."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.gang import Gang
from tests.support.part import Part
from tests.support.ray_workers import START, ray_workers

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "3600000")
os.environ.setdefault("RAY_worker_niceness", "0")  # else the coordinator waits for whatever else runs on this machine

# No deadlines: the machine may be shared. The same examples every time, and a part of them; new ones, and all, are what
# tests/explore.py looks at.
hypothesis.settings.register_profile("same", max_examples=40, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")


FIRST = ("training", "state", "soak", "storage", "telemetry")
"""Folders that begin first: a file is played by one process, and others would wait for a long one that begins last."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The tests that are wide play a part of their cases, the same every time, but with ``--wide``; the long ones none."""
    parser.addoption("--long", action="store_true", help="play the tests that are marked long, too")
    parser.addoption("--wide", action="store_true", help="play them, and every case of the tests that are marked wide")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For several processes at once, by files."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.support.spread import Spread

    return Spread(config, log)


def _seed_of(config: pytest.Config) -> int:
    given = config.getoption("--hypothesis-seed")
    return 0 if given is None else int(given)


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Where the dice of a test begin: the same every time, but where ``--hypothesis-seed`` says."""
    return _seed_of(request.config)


@pytest.fixture(scope="session")
def part(request: pytest.FixtureRequest, seed: int) -> Part:
    """Every n-th of the cases that a test goes through by itself, begun where the seed says; with ``--wide`` all."""
    return Part(seed, request.config.getoption("--wide"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """A million objects come to be, and none goes: to look for garbage among them again and again would take as long."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # nor is it looked for among them later, while tests run
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What depends on the seed can be chosen, and what needs Ray can be left out; of what is wide a part is played.

    The folders that take long begin first.
    """
    whole = config.getoption("--wide")
    left_out = _beyond(Part(_seed_of(config), whole), items)
    if not (whole or config.getoption("--long")):
        left_out |= {item for item in items if item.get_closest_marker("long") is not None}
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] not in FIRST)
    for item in items:
        used = getattr(item, "fixturenames", ())
        if "seed" in used:  # which ``part`` follows too
            item.add_marker("seeded")
        if "ray_address" in used:
            item.add_marker("ray")


def _beyond(part: Part, items: list[pytest.Item]) -> set[pytest.Item]:
    """The cases of wide tests that are not played."""
    cases: dict[tuple[int, str], list[pytest.Item]] = {}
    for item in items:
        marker = item.get_closest_marker("wide")
        if marker is not None:
            whole_class = any(mark.name == "wide" for mark in getattr(getattr(item, "cls", None), "pytestmark", ()))
            together = item.nodeid.rpartition("::")[0] if whole_class else item.nodeid.partition("[")[0]
            cases.setdefault((marker.args[0], together), []).append(item)
    return {item for (every, _), found in cases.items() for item in {*found} - {*part.of(found, every)}}


class SharedCluster:
    """A Ray cluster of two nodes on this machine, which all processes of a test run share; the first starts it."""

    def __init__(self, folder: Path) -> None:
        self._noted = folder / "ray-address"
        self._starting = (folder / "ray-starting").open("w")
        self._using = (folder / "ray-using").open("w")
        self._cluster: Any = None
        self._workers = contextlib.ExitStack()
        fcntl.flock(self._starting, fcntl.LOCK_EX)
        if not self._noted.exists():
            self._workers.enter_context(ray_workers(folder))
            self._cluster = _start_cluster()
            self._noted.write_text(self._cluster.address)
        self.address = self._noted.read_text()
        fcntl.flock(self._using, fcntl.LOCK_SH)
        fcntl.flock(self._starting, fcntl.LOCK_UN)

    def close(self) -> None:
        """Who started it waits for the others."""
        with self._starting, self._using, self._workers:
            if self._cluster is not None:
                fcntl.flock(self._starting, fcntl.LOCK_EX)
                self._noted.unlink()
                fcntl.flock(self._using, fcntl.LOCK_EX)
                self._cluster.shutdown()


def _start_cluster() -> Any:
    from ray.cluster_utils import Cluster

    # Nothing looks at what these would report, and they take as much of the CPUs as some of the tests.
    spared = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    node = {"num_cpus": 4, "object_store_memory": 100 << 20, "setup_worker_path": START}
    cluster = Cluster(initialize_head=True, head_node_args={**node, **spared})
    cluster.add_node(**node)
    logging.getLogger("ray").setLevel(logging.WARNING)
    return cluster


_CLUSTER = pytest.StashKey[SharedCluster]()


@pytest.fixture(scope="session")
def ray_address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the shared Ray cluster."""
    own = tmp_path_factory.getbasetemp()
    cluster = SharedCluster(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)
    request.config.stash[_CLUSTER] = cluster
    import ray
    from ray._private import worker

    # Of a node that one test kills Ray tells all who are connected, half a minute later, on their stdout: into what
    # another test, of what a command prints, had captured.
    worker.print_to_stdstream = lambda *_, **__: None
    yield cluster.address
    ray.shutdown()


@pytest.fixture
def connected(ray_address: str) -> None:
    """This process is a driver of the shared Ray cluster."""
    import ray

    if not ray.is_initialized():
        ray.init(address=ray_address, namespace="distckpt", log_to_driver=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Not in the fixture: waiting for the other processes would count as time of this one's last test."""
    cluster = session.config.stash.get(_CLUSTER, None)
    if cluster is not None:
        cluster.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed may have left ranks in the middle of something: the next one gets others."""
    report = yield
    if report.failed:
        for used in getattr(item, "funcargs", {}).values():
            if isinstance(used, Gang):
                used.renew()
    return report


def _gang(size: int, address: str) -> Iterator[Gang]:
    with Gang(size, {"RAY_ADDRESS": address}) as gang:
        yield gang


@pytest.fixture(scope="session")
def gang2(ray_address: str) -> Iterator[Gang]:
    """Two ranks."""
    yield from _gang(2, ray_address)


@pytest.fixture(scope="session")
def gang3(ray_address: str) -> Iterator[Gang]:
    """Three ranks."""
    yield from _gang(3, ray_address)


@pytest.fixture(scope="session")
def gang4(ray_address: str) -> Iterator[Gang]:
    """Four ranks."""
    yield from _gang(4, ray_address)
