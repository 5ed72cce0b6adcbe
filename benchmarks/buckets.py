"""Object stores: the link, the processor, memory, requests, and what training notices of an upload."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sink
from figures import Figure, plain, ratio
from ranks import run_ranks
from rounds import longest
from uploading import CONNECTIONS, MARK

LATENCY, RATE = 0.02, 4e6
"""Of a connection: seconds for a round trip, and bytes a second."""

SLOW_RATE = 2e6
MANY, LIMIT = 10_000, 200.0
SAVES = 4


def links(folder: Path, repetitions: int) -> list[Figure]:
    """An object of 256 MiB on a link of 20 ms and 4 MB/s a connection."""
    with sink.running(LATENCY, RATE) as server:
        (result,) = run_ranks(1, "uploading:link", folder, url=server.url, repetitions=repetitions)
    seconds = {name: longest([result["measured"]], name, "seconds") for name in result["measured"]}
    bare = f"speed, compared with {CONNECTIONS} bare connections"
    return [
        plain("up", "s", seconds["up"]),
        plain("down", "s", seconds["down"]),
        ratio(f"up: {bare}", seconds["bare POST"], seconds["up"], 0.9, "at least"),
        ratio(f"down: {bare}", seconds["bare GET"], seconds["down"], 0.9, "at least"),
    ]


def transports(folder: Path, repetitions: int) -> list[Figure]:
    """What an object of 512 MiB costs this process on a link without limits."""
    figures = []
    for name, tls, up, down in (("plain", False, 1.0, 0.8), ("TLS", True, 2.5, 2.5)):
        with sink.running(tls=tls) as server:
            told = {"url": server.url, "certificate": server.certificate, "repetitions": repetitions}
            (found,) = run_ranks(1, "uploading:cost", folder, **told)
        figures += [
            plain(f"{name}: processor time a GB up", "s", found["up"], up),
            plain(f"{name}: processor time a GB down", "s", found["down"], down),
            plain(f"{name}: memory beyond the object's own, up", "MiB", found["up memory"], 16.0),
            plain(f"{name}: memory beyond the object's own, down", "MiB", found["down memory"], 16.0),
        ]
    return figures


def buckets(folder: Path, repetitions: int) -> list[Figure]:
    """64 tensors of 1 MiB in a bucket, one process, on a link of 20 ms and 4 MB/s a connection."""
    with _bucket(RATE) as proxy:
        told = {"url": f"gs://{sink.BUCKET}/run", "endpoint": proxy.url, "repetitions": repetitions}
        (found,) = run_ranks(1, "uploading:against", folder, **told)
    return [
        *(plain(name, "s", seconds) for name, seconds in found.items()),
        ratio("save: speed, compared with DCP and fsspec", found["dcp save"], found["save"], 3.0, "at least"),
        ratio("restore: speed, compared with DCP and fsspec", found["dcp restore"], found["restore"], 10.0, "at least"),
    ]


def uploads(folder: Path, repetitions: int) -> list[Figure]:
    """What training notices of an upload: 256 MiB, one process, 20 ms and 2 MB/s a connection."""
    with _bucket(SLOW_RATE):
        told = {"url": f"gs://{sink.BUCKET}/run", "local": str((folder / "disk").resolve())}
        (found,) = run_ranks(1, "uploading:beside", folder, **told, repetitions=repetitions)
    stalls, steps = found["stalls"], found["steps"]
    return [
        *(
            plain(name, "ms", [1e3 * each for each in stalls[what]])
            for what, name in (
                ("bucket", "stall while an upload is running"),
                ("disk", "stall on a local disk, likewise"),
                ("copy", "one copy"),
            )
        ),
        ratio("stall while an upload is running, compared with one copy", stalls["bucket"], stalls["copy"], 1.3),
        *(
            ratio(
                f"a step {how} while an upload is running, compared with one alone",
                [each[at] for each in steps["beside"]],
                [(before[at] + after[at]) / 2 for before, after in zip(steps["alone"], steps["after"], strict=True)],
                target,
            )
            for at, how, target in ((0, "of one thread", 1.05), (1, "of every processor", None))
        ),
    ]


def requests(folder: Path, repetitions: int) -> list[Figure]:
    """What a save asks of the store, without retention, counted by a proxy."""
    figures = []
    for ranks in (1, 2, 4):
        with _bucket(None) as proxy:
            run_ranks(ranks, "uploading:shards", folder, url=f"gs://{sink.BUCKET}/run", saves=SAVES)
            marks = [each.number for each in proxy.seen if MARK in each.target]
        count = (marks[-1] - marks[0] - 1) / SAVES
        figures.append(plain(f"{ranks} shards", "", [count]))
    return figures


def limits(folder: Path, repetitions: int) -> list[Figure]:
    """10,000 shards of 4 KiB below one prefix, and below sixteen, where a server takes 200 requests a second for each."""
    figures = []
    for name, into in (("one prefix", "shards"), ("spread", "{spread}/shards")):
        with sink.running(limit=LIMIT) as server:
            (found,) = run_ranks(1, "uploading:many", folder, url=server.url, count=MANY, folder=into)
            with urllib.request.urlopen(f"{server.url}/requests") as answer:
                told = json.load(answer)
        figures += [
            plain(f"{name}: created", "", [float(found["made"])], MANY, "at least"),
            plain(f"{name}: turned away", "", [float(told["away"])]),
            plain(f"{name}: requests for each", "", [told["requests"] / MANY], 1.3),
            plain(f"{name}: seconds", "s", [found["seconds"]]),
        ]
    return figures


@contextmanager
def _bucket(rate: float | None) -> Iterator[Any]:
    """A proxy of a real server with a bucket, where processes find it that are started now; ``rate`` as of a link."""
    sys.path.append(str(Path(__file__).parent.parent))
    from tests.support import servers  # those that the tests use
    from tests.support.proxy import Proxy

    with servers.fake_gcs() as server, Proxy(server.port, latency=LATENCY if rate else 0.0, rate=rate) as proxy:
        server.make_bucket(sink.BUCKET)
        # gcsfs would first ask in another protocol what kind of bucket it is, and wait a minute for an answer.
        told = {"STORAGE_EMULATOR_HOST": proxy.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        os.environ.update(told)
        try:
            yield proxy
        finally:
            for name in told:
                del os.environ[name]
