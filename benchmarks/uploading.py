"""One process that sends objects to a bucket and fetches them, beside bare connections and DCP. What is measured of it."""

from __future__ import annotations

import http.client
import queue
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Contender, Spans, alternate, now
from sink import BUCKET, SOURCE
from states import Copy
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import distckpt
from distckpt.format.names import attempt_folder, shard_name
from distckpt.storage import Store, open_store

CONNECTIONS = 16
PART_BYTES = 8 << 20
LINK_BYTES = 256 << 20
COST_BYTES = 512 << 20
OBJECT_BYTES = 4 << 10
WORKERS = 32
STEPS = 40
PROCESSORS = torch.get_num_threads()
LAYERS = 64
MARK = "a-mark-of-the-bench"


def link(url: str, repetitions: int) -> dict[str, Any]:
    """An object of LINK_BYTES, up and down, by us and by as many bare connections."""
    store, memory = _store(url), memoryview(bytearray(LINK_BYTES))
    contenders: list[Contender] = [
        *(Up(store, memory), Down(store, memory)),
        *(Bare(url, memory, "POST"), Bare(url, memory, "GET")),
    ]
    return {"measured": alternate(contenders, repetitions)}


def cost(url: str, certificate: str | None, repetitions: int) -> dict[str, Any]:
    """Processor seconds a GB of COST_BYTES, up and down, and MiB more than before at the peak."""
    store, memory = _store(url, **({"verify": certificate} if certificate else {})), memoryview(bytearray(COST_BYTES))
    found: dict[str, list[float]] = {"up": [], "down": [], "up memory": [], "down memory": []}
    for number in range(repetitions + 1):
        for contender in (Up(store, memory), Down(store, memory)):
            before, peak = _processor(), Peak()
            contender.run(number)
            if number:
                what = contender.name
                found[what].append((_processor() - before) / (COST_BYTES / 1e9))
                found[f"{what} memory"].append(peak.megabytes())
    return found


def many(url: str, count: int, folder: str) -> dict[str, Any]:
    """So many small shards by WORKERS threads, into that folder of the bucket: how many were created, and the seconds."""
    place, body = f"gs://{BUCKET}/{folder}", memoryview(bytes(OBJECT_BYTES))
    store = _store(url, connections=WORKERS, data=place, data_options=_options(url, connections=WORKERS))
    paths = [f"{attempt_folder('ckpt', number, f'e1-{number:032x}')}/{shard_name(0, 0)}" for number in range(count)]
    begun = now()
    with ThreadPoolExecutor(WORKERS) as pool:
        made = pool.map(lambda path: store.put_unique(path, OBJECT_BYTES, [body]), paths)
        return {"made": sum(info.size == OBJECT_BYTES for info in made), "seconds": now() - begun}


def beside(url: str, local: str, repetitions: int) -> dict[str, Any]:
    """Stalls of saves to a bucket while the one before is being sent, to a disk, and one copy; and steps beside it.

    Steps of one thread, as those that feed a GPU, and of as many as there are processors.
    """
    state = {f"layer-{number}": torch.randn(1 << 20) for number in range(LAYERS)}
    copy = Copy(state)
    stalls: dict[str, list[float]] = {"bucket": [], "disk": [], "copy": []}
    steps: dict[str, list[tuple[float, float]]] = {"alone": [], "beside": [], "after": []}
    options = {"max_to_keep": 2, "buffers": 2, "save_timeout": 120}
    there = distckpt.CheckpointManager(distckpt.Checkpoint(state=state), url, **options)
    here = distckpt.CheckpointManager(distckpt.Checkpoint(state=state), local, **options)
    with there, here:
        for manager in (there, here):
            manager.prepare()
        for number in range(repetitions + 1):
            alone = _step_seconds(1), _step_seconds(PROCESSORS)
            first = _save(there, 2 * number)
            during = _step_seconds(1), _step_seconds(PROCESSORS)
            second = _save(there, 2 * number + 1)
            assert not first.done(), "the upload was over too early"
            there.wait()
            after = _step_seconds(1), _step_seconds(PROCESSORS)
            _save(here, 2 * number)
            last = _save(here, 2 * number + 1)
            here.wait()
            begun = now()
            copy.run(number)
            if number:
                stalls["copy"].append(now() - begun)
                stalls["bucket"].append(second.stall_seconds)
                stalls["disk"].append(last.stall_seconds)
                steps["alone"].append(alone)
                steps["beside"].append(during)
                steps["after"].append(after)
    return {"stalls": stalls, "steps": steps}


def against(url: str, endpoint: str, repetitions: int) -> dict[str, Any]:
    """A state of many tensors saved and restored in a bucket, by us and by DCP's writer and reader for fsspec."""
    state = {f"layer-{number}": torch.randn(1 << 18) for number in range(LAYERS)}
    seconds: dict[str, list[float]] = {"save": [], "dcp save": [], "restore": [], "dcp restore": []}
    options = {"endpoint_url": endpoint, "token": "anon"}
    with distckpt.CheckpointManager(
        distckpt.Checkpoint(state=state), f"{url}/ours", max_to_keep=1, storage_options=options
    ) as manager:
        manager.prepare()
        for number in range(repetitions + 1):
            path, begun = f"{url}/dcp-{number}", now()
            _save(manager, number).result()
            saved = now()
            dcp.save(state, storage_writer=FsspecWriter(path, sync_files=False, **options), no_dist=True)
            both = now()
            manager.restore()
            restored = now()
            dcp.load(state, storage_reader=FsspecReader(path, **options), no_dist=True)
            if number:
                found = (saved - begun, both - saved, restored - both, now() - restored)
                for name, each in zip(seconds, found, strict=True):
                    seconds[name].append(each)
    return seconds


def shards(url: str, saves: int) -> None:
    """Saves that every rank has a part of. What they ask of the store is counted outside, between two looks at MARK."""
    checkpoint = distckpt.Checkpoint(state=distckpt.PerRank({"mine": torch.ones(1 << 10)}))
    store = open_store(url)
    with distckpt.CheckpointManager(checkpoint, url, max_to_keep=None) as manager:
        for number in range(saves + 1):
            if number == 1:
                _mark(store)
            manager.save(number)
            manager.wait()
        _mark(store)


def _mark(store: Store) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        store.stat(MARK)
    dist.barrier()


class Up:
    """We send the object."""

    name = "up"

    def __init__(self, store: Store, memory: memoryview) -> None:
        self._store = store
        self._memory = memory

    def run(self, number: int) -> Spans:
        """Send it under a new name."""
        begin = now()
        self._store.put_unique(f"up/{time.time_ns()}", len(self._memory), [self._memory])
        return {"seconds": (begin, now())}

    def clean(self, number: int) -> None:
        """Nothing is kept."""


class Down:
    """We fetch it, in the pieces and by as many threads as a restore."""

    name = "down"

    def __init__(self, store: Store, memory: memoryview) -> None:
        self._store = store
        self._memory = memory

    def run(self, number: int) -> Spans:
        """Fetch it."""
        begin = now()
        source = self._store.open(SOURCE)
        _in_threads(len(self._memory), lambda at, end: source.read_into(at, self._memory[at:end]))
        source.close()
        return {"seconds": (begin, now())}

    def clean(self, number: int) -> None:
        """Nothing is kept."""


class Bare:
    """As many connections of ``http.client``, which send or fetch parts of the same length and look at nothing."""

    def __init__(self, url: str, memory: memoryview, method: str) -> None:
        self.name = f"bare {method}"
        self._method = method
        self._memory = memory
        self._connections: queue.SimpleQueue[http.client.HTTPConnection] = queue.SimpleQueue()
        for _ in range(CONNECTIONS):
            self._connections.put(http.client.HTTPConnection(urlsplit(url).netloc))

    def run(self, number: int) -> Spans:
        """Send or fetch all parts."""
        begin = now()
        _in_threads(len(self._memory), self._part)
        return {"seconds": (begin, now())}

    def clean(self, number: int) -> None:
        """Nothing is kept."""

    def _part(self, begin: int, end: int) -> None:
        connection, piece = self._connections.get(), self._memory[begin:end]
        if self._method == "POST":
            connection.request("POST", "/bare", piece, {"Content-Length": str(len(piece))})
            connection.getresponse().read()
        else:
            connection.request("GET", "/bare", headers={"Range": f"bytes={begin}-{end - 1}"})
            answer = connection.getresponse()
            while len(piece):
                piece = piece[answer.readinto(piece) :]
        self._connections.put(connection)


class Peak:
    """How much more memory than now this process will have had."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def megabytes(self) -> float:
        """Until now, in MiB."""
        return (_status("VmHWM") - self._before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def _in_threads(size: int, part: Callable[[int, int], None]) -> None:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        begins = range(0, size, PART_BYTES)
        list(pool.map(lambda begin: part(begin, min(begin + PART_BYTES, size)), begins))


def _store(url: str, **options: Any) -> Store:
    return open_store(f"gs://{BUCKET}/run", _options(url, **options))


def _options(url: str, **options: Any) -> dict[str, Any]:
    return {"endpoint_url": url, "token": "anon", "connections": CONNECTIONS, **options}


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _save(manager: distckpt.CheckpointManager, number: int) -> distckpt.PendingSave:
    return manager.save(number)


def _step_seconds(threads: int) -> float:
    """A step of a loop that multiplies matrices, of which a quarter are quicker: others' work makes steps slower only."""
    left = torch.randn(512, 512)
    seconds = []
    torch.set_num_threads(threads)
    for _ in range(STEPS):
        begin = now()
        for _ in range(8):
            left = torch.nn.functional.normalize(left @ left)
        seconds.append(now() - begin)
    torch.set_num_threads(PROCESSORS)
    return sorted(seconds)[len(seconds) // 4]
