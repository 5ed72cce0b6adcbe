"""What a save does while training waits, and which buffer it waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distckpt.storage import LocalStore, ObjectInfo
from tests.support.small_runs import Trainer, mount, mounting


@pytest.fixture(autouse=True)
def stores() -> Iterator[None]:
    with mounting():
        yield


class Gated(LocalStore):
    """Writes the shards of some checkpoints only once their gates are open."""

    def __init__(self, root: Path, *folders: str) -> None:
        super().__init__(root)
        self.gates = {folder: threading.Event() for folder in folders}

    def put_unique(self, path: str, size: int, sections: Iterable[memoryview]) -> ObjectInfo:
        """See Store."""
        gate = self.gates.get(path.partition("/")[0])
        assert gate is None or gate.wait(60)
        return super().put_unique(path, size, sections)


def test_a_save_waits_for_the_oldest_of_its_buffers_though_numbers_go_down(tmp_path: Path) -> None:
    store = Gated(tmp_path, "ckpt-10", "ckpt-5")
    with Trainer(mount(store), buffers=2) as trainer, ThreadPoolExecutor(1) as elsewhere:
        oldest, second = trainer.save(10), trainer.save(5)
        third = elsewhere.submit(trainer.save, 7)
        try:
            store.gates["ckpt-10"].set()
            assert oldest.result(30)
            assert third.result(10)  # it goes on with the buffer that has become free
            assert not second.done()
        finally:
            store.gates["ckpt-5"].set()
        assert third.result().result(30)
