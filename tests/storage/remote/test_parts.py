"""Parts of a large object on their way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np

from distckpt.storage.remote.budget import Budget
from distckpt.storage.remote.parts import Part, parts_of, send_all

PARTS = 24
AT_ONCE = 2


def test_the_memory_of_a_part_is_let_go_when_it_is_sent() -> None:
    """Else an upload from memory that is made on the way would need as much of it as the object is long."""
    made: list[weakref.ref[np.ndarray]] = []
    most = 0

    def produced() -> Iterator[memoryview]:
        nonlocal most
        for number in range(PARTS):
            most = max(most, sum(each() is not None for each in made))
            section = np.full(1024, number, dtype=np.uint8)
            made.append(weakref.ref(section))
            yield section.data

    def send(number: int, part: Part, stop: threading.Event) -> list[int]:
        return [piece[0] for piece in part]

    assert send_all(parts_of(produced(), 1024), send, Budget(AT_ONCE)) == [[number] for number in range(PARTS)]
    assert most <= AT_ONCE + 2, "those on their way, the one being made, and the one that it is made from"
