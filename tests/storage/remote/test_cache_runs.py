"""Processes of one host restore from a real store behind a proxy that counts, and download each byte once."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from tests.support.proxy import Flip, Proxy, Seen, Stall
from tests.support.s3_bucket import options_for
from tests.support.servers import Server
from tests.support.small_runs import until

ROWS = 9 << 8
PROCESSES = 8


def content() -> dict[str, Any]:
    """9 MiB, in more than one block, and a plain value."""
    return {"weights": torch.arange(ROWS << 10, dtype=torch.float32).reshape(ROWS, 1 << 10), "step": 7}


def is_content(found: Mapping[str, Any]) -> bool:
    return found["step"] == 7 and torch.equal(found["weights"], content()["weights"])


class Run:
    """A checkpoint in a real store, read through a proxy."""

    def __init__(self, directory: str, proxy: Proxy, options: Mapping[str, Any], cache: Path) -> None:
        self.proxy, self.cache = proxy, cache
        self.options = {**options, "cache_dir": str(cache)}
        checkpoint = distckpt.Checkpoint(state=content())
        with distckpt.CheckpointManager(checkpoint, directory, storage_options=options) as manager:
            pending = manager.save(1)
            assert pending is not None
            self.path = pending.result(60)
        with distckpt.open(self.path, options) as reader:
            self.sizes = {f"{shard.rank:05}-{shard.shard}.arrow": shard.size for shard in reader.manifest.shards}
            self.index_size = reader.manifest.index_size
        proxy.seen.clear()

    def received(self, name: str) -> int:
        """How many bytes of an object have come over the wire."""
        return sum(seen.received for seen in self.proxy.seen if is_download(seen) and name in seen.target)

    def kept(self) -> list[Path]:
        return sorted(path for path in self.cache.rglob("*") if path.is_file() and path.name != "usage")


def is_download(seen: Seen) -> bool:
    return seen.method == "GET" and ("alt=media" in seen.target or "?" not in seen.target)


@pytest.fixture
def run(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> Iterator[Run]:
    """On a fake GCS, or the server that the test is parametrized with."""
    name = getattr(request, "param", "fake_gcs")
    server: Server = request.getfixturevalue(name)
    server.make_bucket(bucket)
    with Proxy(server.port) as proxy:
        is_gcs = name == "fake_gcs"
        options = {"endpoint_url": proxy.url, "token": "anon"} if is_gcs else options_for(proxy.url)
        yield Run(f"{'gs' if is_gcs else 's3'}://{bucket}/run", proxy, options, tmp_path / "cache")


def forked(work: Callable[[], bool]) -> int:
    """The pid of a child, which ends with 0 if ``work`` is true."""
    child = os.fork()
    if child:
        return child
    try:
        code = 0 if work() else 1
    except BaseException:  # noqa: BLE001  it must not go on as a test
        traceback.print_exc()
        code = 2
    os._exit(code)


def restored(run: Run) -> bool:
    torch.set_num_threads(1)
    return is_content(distckpt.load(run.path, "state", storage_options=run.options))


@pytest.mark.wide(2)
@pytest.mark.parametrize("run", ["fake_gcs", "moto"], indirect=True)
def test_eight_processes_that_restore_download_each_byte_once(run: Run) -> None:
    children = [forked(lambda: restored(run)) for _ in range(PROCESSES)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * PROCESSES
    assert {name: run.received(name) for name in run.sizes} == run.sizes
    assert run.received("index.arrow") == run.index_size
    run.proxy.seen.clear()
    assert restored(run)
    assert run.received("") < 1 << 16  # log and manifest


def test_one_that_is_killed_while_others_wait_for_what_it_fetches_is_replaced_by_one_of_them(run: Run) -> None:
    (name,) = run.sizes
    run.proxy.fail(Stall(), when=lambda seen: is_download(seen) and name in seen.target)
    first = forked(lambda: restored(run))
    assert until(lambda: not run.proxy.planned)
    children = [forked(lambda: restored(run)) for _ in range(3)]
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert run.received(name) == run.sizes[name]
    assert not [path for path in run.kept() if path.name.endswith(".part")]


def test_damage_in_the_cache_and_on_the_wire_is_not_blamed_on_the_checkpoint(run: Run) -> None:
    (name,) = run.sizes
    run.proxy.fail(Flip(5 << 20), when=lambda seen: is_download(seen) and name in seen.target)
    assert restored(run)
    assert not run.proxy.planned
    assert restored(run)
    for path in run.kept():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert restored(run)
    with distckpt.open(run.path, run.options) as reader:
        assert reader.verify().damages == ()


def test_a_part_of_a_shard_downloads_a_part_of_it(run: Run) -> None:
    with distckpt.open(run.path, run.options) as reader:
        assert reader.value("state.step") == 7
    (name,) = run.sizes
    assert 0 < run.received(name) <= 8 << 20
