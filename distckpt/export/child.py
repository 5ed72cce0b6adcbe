"""The child process of a manager that makes exports where there is no Ray."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from queue import SimpleQueue
from typing import BinaryIO

import msgspec

from distckpt.export.packing import unpack
from distckpt.export.places import LENGTH_BYTES
from distckpt.export.task import Outcome, carry_out_aside


def serve() -> None:
    """Carry out orders from stdin, answering each with one line on stdout, until there are no more: then end at once."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not go between the answers
    orders: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, orders), daemon=True).start()
    while True:
        answers.write(msgspec.json.encode(_answer(orders.get())) + b"\n")
        answers.flush()


def _listen(stdin: BinaryIO, orders: SimpleQueue[bytes]) -> None:
    while length := int.from_bytes(stdin.read(LENGTH_BYTES), "little"):
        orders.put(stdin.read(length))
    os._exit(0)  # the manager has gone: nobody waits for an answer, and an export under way will be made again


def _answer(order: bytes) -> Outcome:
    try:
        return carry_out_aside(unpack(order))
    except Exception as error:  # noqa: BLE001 - whatever unpickling raises, such as for a module that is not found here
        return Outcome("failed", f"{type(error).__name__}: {error}", trace=traceback.format_exc())
