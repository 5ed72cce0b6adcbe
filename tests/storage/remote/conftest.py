"""Real servers, each started when the first test asks for it, and what they have logged beside a test that fails."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator

import pytest

from tests.support import servers
from tests.support.servers import Server


@pytest.fixture(scope="session")
def fake_gcs() -> Iterator[Server]:
    """A GCS; see servers.fake_gcs."""
    with servers.fake_gcs() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """An S3; see servers.moto."""
    with servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[Server]:
    """An S3 that checks signatures and checksums; see servers.seaweedfs."""
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[Server]:
    """An S3 that ignores conditions; see servers.rclone."""
    with servers.rclone() as server:
        yield server


@pytest.fixture
def bucket() -> str:
    """A name for a bucket that nobody else has; ``server.make_bucket`` makes it."""
    return f"bucket-{uuid.uuid4().hex}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed shows what the servers it used have logged."""
    report = yield
    if report.failed:
        used = getattr(item, "fixturenames", ())
        found = [server for server in servers.RUNNING if server.fixture in used]
        report.sections += [(f"log of {server.fixture}", server.logged()) for server in found]
    return report
