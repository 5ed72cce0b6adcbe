"""Shared by all tests: one Ray cluster of two nodes, and gangs of rank processes that live for the whole session."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests.gang import Gang

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "3600000")
os.environ.setdefault("RAY_worker_niceness", "0")  # else the coordinator waits for whatever else runs on this machine

# No deadlines: the machine may be shared. In CI the same examples every time; elsewhere new ones, printed when they fail.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine, which all processes of this test run share."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    noted = shared / "ray-address"
    with (shared / "ray-starting").open("w") as starting, (shared / "ray-using").open("w") as using:
        fcntl.flock(starting, fcntl.LOCK_EX)
        cluster = None if noted.exists() else _start_cluster()
        if cluster is not None:
            noted.write_text(cluster.address)
        fcntl.flock(using, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield noted.read_text()
        import ray

        ray.shutdown()
        if cluster is not None:
            fcntl.flock(starting, fcntl.LOCK_EX)
            noted.unlink()
            fcntl.flock(using, fcntl.LOCK_EX)  # once the others have finished
            cluster.shutdown()


def _start_cluster() -> Any:
    from ray.cluster_utils import Cluster

    # Nothing looks at what these would report, and they take as much of the CPUs as some of the tests.
    spared = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    node = {"num_cpus": 4, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, **spared})
    cluster.add_node(**node)
    logging.getLogger("ray").setLevel(logging.WARNING)
    return cluster


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
