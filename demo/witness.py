"""What the demo records of a training run: events, a digest of every tensor, and, if told so, a sudden death."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import distckpt


@dataclass(frozen=True, slots=True)
class Witnessed:
    """The files to which events and digests go, and which rank dies after the save of which step."""

    events: str
    digests: str
    die_at_step: int | None = None
    die_rank: int = 0

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The command line's part of it."""
        group = parser.add_argument_group("for the witness")
        group.add_argument("--events", required=True, help="append a line of JSON to this file for all that happens")
        group.add_argument("--digests", required=True, help="write digests to this folder at saves and restores")
        group.add_argument("--die-at-step", type=int, help="kill a rank directly after it has called save at this step")
        group.add_argument("--die-rank", type=int, default=0, help="which rank that is")

    @staticmethod
    def taken_from(given: dict[str, Any]) -> Witnessed:
        """What was given on the command line; the rest stays in ``given``."""
        return Witnessed(**{field.name: given.pop(field.name) for field in fields(Witnessed)})


class Witness:
    """Sees what one rank does. ``values`` are objects with ``state_dict``, or plain dicts, recorded as JSON."""

    def __init__(
        self, options: Witnessed, model: torch.nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Any]
    ) -> None:
        self._options = options
        self._model = model
        self._optimizer = optimizer
        self._values = values
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._last = self._called = time.perf_counter()
        self._watching: threading.Thread | None = None

    def started(self, restored: str | None, step: int) -> None:
        """The objects have been restored, or are fresh."""
        if restored is not None:
            self._write_digests("restored", step)
        self._event("started", restored=restored, step=step, pid=os.getpid())
        self._last = time.perf_counter()

    def stepped(self, step: int, loss: float, samples: int) -> None:
        """A step is done; ``samples`` have been taken by all ranks together since the very beginning."""
        now = time.perf_counter()
        if self._rank == 0:
            self._event("step", step=step, loss=loss, samples=samples, seconds=now - self._last)
        self._last = now

    def saving(self, step: int) -> None:
        """``save`` is about to be called."""
        self._write_digests("saved", step)
        self._called = time.perf_counter()

    def saved(self, step: int, pending: distckpt.PendingSave | None) -> None:
        """``save`` has returned. This process dies if it was told to; if not, how long the call took is recorded."""
        if step == self._options.die_at_step and self._rank == self._options.die_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        self._event("saved", step=step, stall=time.perf_counter() - self._called)
        if self._rank == 0 and pending is not None:
            self._watching = threading.Thread(target=self._watch, args=(step, self._called, pending), daemon=True)
            self._watching.start()
        self._last = time.perf_counter()

    def ended(self) -> None:
        """All saves are decided, and so their events are about to be written."""
        if self._watching is not None:
            self._watching.join()

    def _watch(self, step: int, called: float, pending: distckpt.PendingSave) -> None:
        # Asks again and again, since whoever waits for a result is the one who is told of a failure: not our business.
        while not pending.done():
            time.sleep(0.002)
        self._event("decided", step=step, seconds=time.perf_counter() - called)

    def _event(self, kind: str, **told: object) -> None:
        line = {"event": kind, "time": time.time(), "rank": self._rank, "world_size": self._world, **told}
        with Path(self._options.events).open("a") as file:  # one write a line, so lines of ranks do not mix
            file.write(json.dumps(line) + "\n")

    def _write_digests(self, moment: str, step: int) -> None:
        tensors = {key: digest(whole(tensor)) for key, tensor in self._tensors()}
        values = {
            name: value if isinstance(value, dict) else value.state_dict() for name, value in self._values.items()
        }
        if self._rank == 0:
            path = Path(self._options.digests, digests_name(moment, step, self._world))
            path.write_text(json.dumps({"tensors": tensors, "values": values}))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of model and optimizer with the keys that a checkpoint has for them."""
        named = dict(self._model.named_parameters())
        yield from ((f"model.{name}", parameter) for name, parameter in named.items())
        names: dict[object, str] = {parameter: name for name, parameter in named.items()}
        for parameter, state in self._optimizer.state.items():
            yield from ((f"optimizer.state.{names[parameter]}.{field}", value) for field, value in state.items())


def digests_name(moment: str, step: int, world_size: int) -> str:
    """The file with the digests of one moment of a run."""
    return f"{moment}-{step}-on-{world_size}.json"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor of which each rank holds a part, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of type, shape and every bit."""
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data.tobytes()).hexdigest()
