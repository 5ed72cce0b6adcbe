"""Two hosts, each with an address, processes, a host name and temporary files of its own, joined by a cable.

They are namespaces of this machine's kernel. Making them needs root and Debian's iproute2; without these, skipped.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import distckpt
from tests.support.gang import Gang

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

ENTER = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs "$2/own"
export HOME="$2/$1"
shift 2
"$@"
"""
"""What makes a network namespace a host: run in further namespaces, which end with the command that it runs."""


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def network(names: tuple[str, str]) -> Iterator[None]:
    """Two network namespaces with an interface eth0 each; nothing is left of them, nor of what runs in them."""
    made = []
    try:
        for name in names:
            call("ip", "netns", "add", name)
            made.append(name)
        call("ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("ip", "-n", name, "link", "set", "eth0", "up")
        for name, other in zip(names, reversed(ADDRESSES), strict=True):
            call("ip", "-n", name, "route", "add", "default", "via", other)  # Ray asks for the address it would use
        yield
    finally:
        for name in made:
            for process in call("ip", "netns", "pids", name).split():
                os.kill(int(process), signal.SIGKILL)
            call("ip", "netns", "delete", name)


def check_permitted() -> None:
    """Skip where such hosts cannot be made."""
    name = f"distckpt-{os.getpid()}-try"
    inside = ("unshare", "--uts", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/mnt")
    try:
        call("ip", "netns", "add", name)
        try:
            call("ip", "netns", "exec", name, *inside)
        finally:
            call("ip", "netns", "delete", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"hosts cannot be made of namespaces here: {getattr(error, 'stderr', '') or error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both hosts see, but for the folder ``own``, of which each has one of its own."""
    folder = tmp_path_factory.mktemp("hosts")
    for name in (*NAMES, "own"):
        (folder / name).mkdir()
    (folder / "resolv.conf").touch()
    lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[Gang]:
    """Rank 0 on host-a, rank 1 on host-b, and Ray on neither."""
    check_permitted()
    Path("/tmp/ray").mkdir(exist_ok=True)
    spaces = (f"distckpt-{os.getpid()}-a", f"distckpt-{os.getpid()}-b")
    apart = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ENTER, "sh")
    hosts = [
        ("ip", "netns", "exec", space, *apart, name, str(folder)) for space, name in zip(spaces, NAMES, strict=True)
    ]
    env = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "eth0", "RAY_ADDRESS": "", "RAY_TMPDIR": "/tmp/ray"}
    with network(spaces), Gang(2, env, hosts=hosts) as gang:
        yield gang


def test_two_hosts_save_and_resume_through_a_ray_cluster_that_they_start(ranks: Gang, folder: Path) -> None:
    before = ranks.run("ranks.saves:save", directory=str(folder / "run"), kind="fsdp")
    assert [result["path"] for result in before] == [f"{folder}/run/ckpt-1"] * 2
    with distckpt.open(folder / "run") as reader:
        assert reader.manifest.world_size == 2
        assert reader.verify().good
    after = ranks.run("ranks.saves:restore", directory=str(folder / "run"), kind="fsdp")
    assert [result["digest"] for result in after] == [result["digest"] for result in before]
    here, there = ranks.run("ranks.hosts:host")
    assert (here["name"], len(here["nodes_that_wait"])) == ("host-a", 1)
    # Rank 1 has started a node there, which goes when the cluster is gone, though training waits for it.
    assert there == {"name": "host-b", "nodes_that_wait": [False]}
    assert ranks.run("ranks.hosts:open_doors") == [[], []]


def test_a_directory_that_hosts_do_not_share_is_noticed_and_the_host_named(ranks: Gang, folder: Path) -> None:
    for error in ranks.run("ranks.hosts:save_error", directory=str(folder / "own")):
        assert error["kind"] == "NotSharedError"
        assert "rank 1 (host-b)" in error["text"]
        assert f"{folder}/own" in error["text"]
    assert list((folder / "own").iterdir()) == []
    again = ranks.run("ranks.saves:restore", directory=str(folder / "run"), kind="fsdp")
    assert [result["path"] for result in again] == [f"{folder}/run/ckpt-1"] * 2
