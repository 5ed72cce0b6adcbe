"""The servers that tests of object stores start: where they listen, and that they are gone afterwards."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager

import psutil
import pytest

from tests.support import servers
from tests.support.servers import Server


@pytest.mark.parametrize("name", ["fake_gcs", "moto", "seaweedfs", "rclone"])
def test_a_server_makes_buckets_and_listens_on_loopback_alone(
    name: str, request: pytest.FixtureRequest, bucket: str
) -> None:
    server: Server = request.getfixturevalue(name)
    server.make_bucket(bucket)
    addresses = {each.laddr.ip for each in psutil.Process(server.pid).net_connections("tcp") if each.status == "LISTEN"}
    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize("start", [servers.fake_gcs, servers.rclone])
def test_a_server_ends_with_its_test_and_leaves_nothing(start: Callable[[], AbstractContextManager[Server]]) -> None:
    with start() as server:
        assert server in servers.RUNNING
        assert server.log.exists()
    assert server not in servers.RUNNING
    assert not psutil.pid_exists(server.pid)
    assert not server.log.parent.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
