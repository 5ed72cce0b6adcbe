"""Ranks that save until they are killed."""

from __future__ import annotations

import json
import os
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distckpt.errors import DistckptError
from tests.soak.subject import PATIENCE, Subject, number_of, stamp


def live(directory: str, diary: str, life: int, elements: int, **options: Any) -> None:
    """Restore, and save until death comes; write into a diary what a ``Witness`` wants to know.

    An error of distckpt's is written down as "refused": another rank may have died before.
    """
    written = os.open(f"{diary}-{dist.get_rank()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(what: str, detail: object) -> None:
        os.write(written, json.dumps([what, detail]).encode() + b"\n")

    zeros = torch.zeros(elements, dtype=torch.int64)
    large = distribute_tensor(zeros, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    try:
        with Subject(directory, large, **options) as subject:
            restored = subject.restore()
            say("restored", restored)
            number = number_of(restored or 0)
            while True:
                number += 1
                say("begun", stamp(number, life))
                subject.save(number, life).result(PATIENCE)
                say("saved", stamp(number, life))
    except DistckptError as error:
        say("refused", f"{type(error).__name__}: {error}")
    except BaseException:  # noqa: BLE001 - it is told as what it is
        say("broken", traceback.format_exc())
