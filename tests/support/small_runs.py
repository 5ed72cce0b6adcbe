"""Small runs in one process, for tests that do harm: what checkpoint ``number`` holds is known from the number."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import distckpt
from distckpt.coordinator.messages import Pin, Reply
from distckpt.directory.log import read_entry, read_tail, sequence_numbers
from distckpt.format import names
from distckpt.format.json.lease import FORMAT as LEASE_FORMAT
from distckpt.format.json.lease import Lease
from distckpt.format.json.log import CheckpointRecord, Entry
from distckpt.format.json.sealed import seal
from distckpt.storage import LocalStore, PathLike, Store, location
from tests.support.comparing import same

SCHEME = "tested"


def tree(number: int) -> dict[str, Any]:
    """What checkpoint ``number`` holds: tensors of several types, and plain values."""
    generator = torch.Generator().manual_seed(number)
    return {
        "weights": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "nested": {"count": torch.tensor(number), "names": ["a", "b"], "step": number},
    }


def target() -> distckpt.Checkpoint:
    """Something of the same structure, which holds other values."""
    return distckpt.Checkpoint(state=tree(65535))


class Trainer:
    """A manager and the state that it saves. Use as a context manager, like the manager."""

    def __init__(self, directory: PathLike, **options: Any) -> None:
        self.checkpoint = target()
        self.manager = distckpt.CheckpointManager(self.checkpoint, directory, **options)

    def save(self, number: int) -> distckpt.PendingSave:
        """Begin to save what checkpoint ``number`` holds."""
        fill(self.checkpoint, number)
        return self.manager.save(number)

    def saved(self, number: int) -> str:
        """Save what checkpoint ``number`` holds, and wait until it is committed; its path."""
        return self.save(number).result(60)

    def ask(self, request: Any) -> Reply:
        """Ask the coordinator directly."""
        return self.manager._client._line_and_run(30)[0].ask(request, 30)

    def pin(self, number: int) -> None:
        """Pin a checkpoint."""
        assert type(self.ask(Pin(number, True))).__name__ == "Accepted"

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.__exit__(*error)  # type: ignore[arg-type]


def fill(checkpoint: distckpt.Checkpoint, number: int) -> None:
    """Put into ``checkpoint`` what number ``number`` holds."""
    _pour(tree(number), checkpoint.state)


def _pour(source: Mapping[str, Any], into: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, torch.Tensor):
            into[key].copy_(value)
        elif isinstance(value, dict):
            _pour(value, into[key])
        else:
            into[key] = value


def run(directory: PathLike, *numbers: int, **options: Any) -> None:
    """A run that saves these numbers and ends."""
    with Trainer(directory, **options) as trainer:
        for number in numbers:
            trainer.saved(number)


def followed_run(directory: Path) -> None:
    """Three checkpoints, of which 1 was reported on, 2 is at a worker, and 3 waits."""
    with Trainer(directory, max_to_keep=None) as trainer:
        for number in (1, 2, 3):
            trainer.saved(number)
    watching = distckpt.watch(directory, group="eval", mode="all", worker="alice <1>", timeout=0, max_in_flight=2)
    with next(watching) as first:
        first.report({"loss": 1.25})
    next(watching)


def holds(state: Any, number: int) -> bool:
    """Whether ``state`` is, bit for bit, what checkpoint ``number`` holds."""
    return same(tree(number), state)


def assert_loads(path: PathLike, number: int) -> None:
    """Every byte of the checkpoint at ``path`` is in order, and it is number ``number`` bit for bit."""
    with distckpt.open(path) as reader:
        assert reader.verify().damages == ()
        assert reader.manifest.number == number
        assert holds(reader.load("state"), number), path


def records(directory: PathLike, options: Mapping[str, Any] | None = None) -> list[CheckpointRecord]:
    """The active checkpoints of the log, oldest first."""
    return list(read_tail(location.open_store(directory, options)).state.active)


def numbers(directory: PathLike, options: Mapping[str, Any] | None = None) -> list[int]:
    """The numbers of the active checkpoints, oldest first."""
    return [record.number for record in records(directory, options)]


def attempt_folder(directory: PathLike, number: int) -> Path:
    """Where the files of an active checkpoint are."""
    record = next(record for record in records(directory) if record.number == number)
    return Path(directory) / names.attempt_folder(record.name, record.number, record.attempt)


def files(directory: PathLike) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return _files_that_stay(directory)


def lease_on(directory: Path, number: int, seconds: float) -> str:
    """Claim an active checkpoint, as a reader does; the lease's path inside the directory."""
    attempt = next(record.attempt for record in records(directory) if record.number == number)
    path = f"{names.LEASES}/reader-1.json"
    LocalStore(directory).replace(path, seal(Lease(LEASE_FORMAT, attempt, "reader-1", seconds)))
    return path


def leftovers(directory: PathLike) -> set[str]:
    """Files that nothing refers to: neither the log, nor a checkpoint that it knows."""
    state = read_tail(LocalStore(directory)).state
    known = [*state.active, *state.preserved, *state.retiring]
    folders = tuple(f"{names.attempt_folder(record.name, record.number, record.attempt)}/" for record in known)
    found = files(directory)
    return {
        path
        for path in found
        if path != names.STATE_FILE
        and names.stats_run(path) is None
        and not (path.startswith(folders) and not Path(path).name.startswith("."))
        and not (path.startswith(f"{names.LOG}/") and names.entry_seq(path) is not None)
    }


def until(met: Callable[[], object], seconds: float = 20.0) -> bool:
    """Wait for ``met``, at most so long; whether it came."""
    deadline = time.monotonic() + seconds
    while not (found := met()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(found)


def settled(directory: PathLike) -> dict[str, bytes]:
    """Every file, once nothing has changed for a while: a save is answered before all that follows from it is done."""
    before, now = None, _files_that_stay(directory)
    while before != now:
        time.sleep(0.3)
        before, now = now, _files_that_stay(directory)
    return now


def _files_that_stay(directory: PathLike) -> dict[str, bytes]:
    found = {}
    for path in _files(directory):
        with contextlib.suppress(FileNotFoundError):
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def _files(directory: PathLike) -> Iterator[Path]:
    for folder, _, files in os.walk(directory):  # unlike rglob it can stand a folder that goes away meanwhile
        yield from (Path(folder, file) for file in files)


def on_disk(directory: PathLike) -> list[int]:
    """Numbers of the checkpoints that have any file left, ascending."""
    return sorted({int(path.parts[0].rpartition("-")[2]) for path in _checkpoint_files(Path(directory))})


def _checkpoint_files(root: Path) -> Iterator[Path]:
    for path in _files(root):
        inside = path.relative_to(root)
        if names.parse_checkpoint(inside.parts[0]) is not None:
            yield inside


def entries(directory: PathLike) -> list[Entry]:
    """The log, oldest entry first."""
    store = LocalStore(directory)
    return [read_entry(store, seq) for seq in sequence_numbers(store)]


def assert_sound_log(directory: PathLike) -> list[Entry]:
    """The log is contiguous, says what its names say, and no epoch follows a later one; its entries."""
    log = entries(directory)
    assert [entry.seq for entry in log] == list(range(log[0].seq, log[0].seq + len(log)))
    assert len({entry.commit_id for entry in log}) == len(log)
    for before, after in itertools.pairwise(log):
        assert after.epoch >= before.epoch
        assert (after.kind == "claim") == (after.epoch > before.epoch)
    return log


@contextlib.contextmanager
def mounting() -> Iterator[None]:
    """Inside, ``mount`` gives stores a URL that managers and readers take."""
    location._OPENERS[SCHEME] = _open_mounted
    try:
        yield
    finally:
        del location._OPENERS[SCHEME]
        _STORES.clear()


def mount(store: Store) -> str:
    """The URL of ``store``, for as long as ``mounting`` lasts."""
    url = f"{SCHEME}://{uuid.uuid4().hex}"
    _STORES[url] = store
    return url


def _open_mounted(url: str, options: Mapping[str, Any]) -> Store:
    assert not options
    return _STORES[url]


_STORES: dict[str, Store] = {}
