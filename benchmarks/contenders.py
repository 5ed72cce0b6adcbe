"""Everyone who saves or loads the same objects: distckpt, torch's distributed checkpoint, torch.save, and bare writes."""

from __future__ import annotations

import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rounds import Spans, now
from states import tensors
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import distckpt

WRITE_BYTES = 32 << 20
DELETE_SECONDS = 30.0


class Distckpt:
    """Saves through a manager that keeps one checkpoint."""

    name = "distckpt"

    def __init__(self, checkpoint: distckpt.Checkpoint, folder: Path) -> None:
        self._folder = folder
        self.manager = distckpt.CheckpointManager(checkpoint, folder, max_to_keep=1)
        self.manager.prepare()

    def run(self, number: int) -> Spans:
        """Save, and wait until it is committed."""
        begin = now()
        pending = self.manager.save(number)
        pending.wait_staged()
        staged = now()
        pending.result()
        return {"stall": (begin, staged), "durable": (begin, now())}

    def clean(self, number: int) -> None:
        """The manager deletes the checkpoint before this one by itself, in the background: wait for that."""
        before = self._folder / f"ckpt-{number - 1}"
        deadline = time.monotonic() + DELETE_SECONDS
        while dist.get_rank() == 0 and before.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        dist.barrier()


class Dcp:
    """``dcp.save``: with no options, or with a writer of several threads."""

    def __init__(self, tree: dict[str, Any], folder: Path, threads: int | None = None) -> None:
        self.name = "dcp" if threads is None else f"dcp-{threads}-threads"
        self._tree = tree
        self._folder = folder / self.name
        self._threads = threads

    def run(self, number: int) -> Spans:
        """Save; DCP syncs its files itself."""
        path = self._folder / str(number)
        writer = dcp.FileSystemWriter(path, thread_count=self._threads) if self._threads else None
        begin = now()
        dcp.save(self._tree, checkpoint_id=path, storage_writer=writer)
        return {"durable": (begin, now())}

    def clean(self, number: int) -> None:
        """Delete what was saved."""
        remove(self._folder / str(number))


class DcpAsync:
    """``dcp.async_save`` by another process out of shared memory, the way that stalls training least.

    ``staging_thread`` copies in a thread, for which the training loop must wait before it changes anything.
    """

    def __init__(self, tree: Callable[[], dict[str, Any]], folder: Path, staging_thread: bool = False) -> None:
        self.name = "dcp-async-thread" if staging_thread else "dcp-async"
        self._tree = tree
        self._folder = folder / self.name
        self._stager = DefaultStager(StagingOptions(False, True, staging_thread, False))

    def run(self, number: int) -> Spans:
        """Save, and wait until it is done."""
        path = self._folder / str(number)
        begin = now()
        response = dcp.async_save(
            self._tree(),
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
        )
        upload = response
        if not hasattr(response, "result"):
            response.staging_completion.result()
            upload = response.upload_completion
        staged = now()
        upload.result()
        return {"stall": (begin, staged), "durable": (begin, now())}

    def clean(self, number: int) -> None:
        """Delete what was saved."""
        remove(self._folder / str(number))


class TorchSave:
    """Every rank saves what it holds by ``torch.save``, flushed and synced."""

    name = "torch.save"

    def __init__(self, tree: dict[str, Any], folder: Path) -> None:
        self._state = list(tensors(tree))
        self._folder = folder / self.name

    def run(self, number: int) -> Spans:
        """Save one file a rank."""
        self._folder.mkdir(parents=True, exist_ok=True)
        begin = now()
        with (self._folder / f"{number}-{dist.get_rank()}.pt").open("xb") as file:
            torch.save(self._state, file)
            file.flush()
            os.fsync(file.fileno())
        return {"durable": (begin, now())}

    def clean(self, number: int) -> None:
        """Delete what was saved."""
        remove(self._folder)


class RawWrite:
    """Bare writes of warm memory to ``files`` files in all, synced: as fast as this disk takes these bytes."""

    def __init__(self, memory: mmap.mmap, folder: Path, files: int, direct: bool) -> None:
        self.name = f"raw-{files}-{'direct' if direct else 'buffered'}"
        self._memory = memoryview(memory)
        self._files = files
        self._flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
        self._folder = folder / self.name

    def run(self, number: int) -> Spans:
        """One file is written by rank 0 alone; else every rank writes its bytes, to two files by two threads if 4."""
        self._folder.mkdir(parents=True, exist_ok=True)
        begin = now()
        if self._files == 1:
            if dist.get_rank() == 0:
                self._write("all", [self._memory] * dist.get_world_size())
        else:
            self._write_parts(self._files // dist.get_world_size())
        return {"durable": (begin, now())}

    def clean(self, number: int) -> None:
        """Delete what was written."""
        remove(self._folder)

    def _write_parts(self, count: int) -> None:
        step = -(-len(self._memory) // count // mmap.PAGESIZE) * mmap.PAGESIZE
        parts = [self._memory[begin : begin + step] for begin in range(0, len(self._memory), step)]
        threads = [
            threading.Thread(target=self._write, args=(f"{dist.get_rank()}-{number}", [part]))
            for number, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _write(self, name: str, parts: list[memoryview]) -> None:
        fd = os.open(self._folder / name, self._flags, 0o644)
        try:
            position = 0
            for part in parts:
                for begin in range(0, len(part), WRITE_BYTES):
                    position += _write_all(fd, part[begin : begin + WRITE_BYTES], position)
            os.fsync(fd)
        finally:
            os.close(fd)


def _write_all(fd: int, piece: memoryview, position: int) -> int:
    done = 0
    while done < len(piece):
        done += os.pwrite(fd, piece[done:], position + done)
    return done


def remove(path: Path) -> None:
    """Rank 0 deletes the folder; all ranks return when it is gone."""
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
