"""Which rank this process is, how many there are, and how rank 0 tells the others something before Ray is up."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from distckpt.errors import AbsentRanksError

SHARE_SECONDS = 300.0
MOST_OF_RUN_ID = 200
ANSWER_SECONDS = 1.0
"""How much longer than rank 0 the others wait, so that they hear from it who has not come."""


class Share(Protocol):
    """Returns rank 0's text on every rank; a collective. AbsentRanksError after ``timeout`` seconds (None: a default)."""

    def __call__(self, text: str, timeout: float | None = None) -> str:
        """See the class."""


def _alone(text: str, timeout: float | None = None) -> str:
    return text


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``. ``share`` returns rank 0's text on every rank; a collective where size > 1.

    ``token`` names this incarnation of the job where the environment gives it a name, else it is None and rank 0
    invents one.
    """

    rank: int
    size: int
    share: Share | None = field(default=_alone, repr=False)
    token: str | None = None
    host: str = field(default_factory=socket.gethostname)
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks")


def find_world(
    rank: int | None = None, world_size: int | None = None, run_id: str | None = None, timeout: float = SHARE_SECONDS
) -> World:
    """The world that was given, else torch.distributed's, Ray Train's, torchrun's variables', or a world of one.

    With ``rank`` and ``world_size`` given for more than one rank and no torch.distributed, ``run_id`` must name the
    incarnation of the job: the same text on every rank, another one after every restart. ValueError otherwise, and for
    a text that the log has no room for.
    ``timeout`` is how many seconds ranks wait for each other when they share something.
    """
    if run_id is not None and not 0 < len(run_id) <= MOST_OF_RUN_ID:
        raise ValueError(f"run_id must be a text of 1 to {MOST_OF_RUN_ID} characters, not {run_id!r:.80}")
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is not None and world_size is not None:
        return _given_world(rank, world_size, run_id, timeout)
    return _torch_world(timeout) or _ray_train_world() or _torchrun_world(run_id, timeout) or World(0, 1, token=run_id)


def new_token() -> str:
    """A name for an incarnation of the job that nobody has used before."""
    return uuid.uuid4().hex


def _given_world(rank: int, world_size: int, run_id: str | None, timeout: float) -> World:
    if world_size == 1:
        return World(rank, 1, token=run_id)
    found = _torch_world(timeout)
    if found is not None and found.size == world_size:
        return World(rank, world_size, found.share, run_id, local_rank=found.local_rank)
    if run_id is None:
        raise ValueError(
            "rank and world_size were given without torch.distributed: give run_id too, the same text on every rank "
            "and another one after every restart of the job, so that older processes can be told from newer ones"
        )
    return World(rank, world_size, None, run_id, local_rank=_local_rank())


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _torch_world(timeout: float) -> World | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() == 1:
        return World(0, 1)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not in its __all__
    from torch.distributed.distributed_c10d import _get_default_store

    rank, size = dist.get_rank(), dist.get_world_size()
    store = PrefixStore("distckpt", _get_default_store())
    return World(rank, size, _Exchange(store, rank, size, timeout), local_rank=_local_rank())


def _ray_train_world() -> World | None:
    # A Ray Train worker has imported ray.train; anybody else need not pay for the import.
    train: Any = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        rank, size = context.get_world_rank(), context.get_world_size()
    except (RuntimeError, AttributeError):
        return None  # not inside a training function
    if rank is None or size is None:
        return None
    if size == 1:
        return World(0, 1)
    from ray.train.collective import broadcast_from_rank_zero

    def share(text: str, timeout: float | None = None) -> str:
        return str(broadcast_from_rank_zero(text))

    return World(rank, size, share, local_rank=context.get_local_rank())


def _torchrun_world(run_id: str | None, timeout: float) -> World | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return World(0, 1, token=run_id)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return World(rank, size, _Exchange(_agent_store(), rank, size, timeout), run_id, local_rank=_local_rank())
    if run_id is None:
        raise ValueError("call torch.distributed.init_process_group before distckpt, or give run_id")
    return World(rank, size, None, run_id, local_rank=_local_rank())


def _agent_store() -> Any:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SHARE_SECONDS))
    return PrefixStore(f"distckpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class _Exchange:
    """Shares through a torch store. Each call of each rank has keys of its own, which no other call ever uses.

    A rank that calls counts its calls in the store and waits for rank 0's answer to this one. Rank 0 answers once every
    rank waits, and tells those that do who has not come. A call that was given up is marked, and rank 0 passes it over:
    so ranks of which some once called alone find together again.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._timeout = timeout

    def __call__(self, text: str, timeout: float | None = None) -> str:
        """See Share."""
        seconds = self._timeout if timeout is None else timeout
        return self._lead(text, seconds) if self._rank == 0 else self._follow(seconds)

    def _lead(self, text: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        calls = {rank: self._await_call(rank, deadline) for rank in range(1, self._size)}
        absent = [rank for rank, call in calls.items() if not call]
        answer = json.dumps({"text": text, "absent": absent})
        for rank, call in calls.items():
            if call:
                self._store.set(f"answer/{rank}/{call}", answer)
        if absent:
            raise AbsentRanksError(absent, seconds)
        return text

    def _await_call(self, rank: int, deadline: float) -> int:
        """Which call of that rank waits for an answer, 0 if none does before the deadline."""
        call = self._store.add(f"passed/{rank}", 0) + 1
        while self._comes(f"call/{rank}/{call}", deadline):
            self._store.add(f"passed/{rank}", 1)
            if not self._store.check([f"gone/{rank}/{call}"]):
                return int(call)
            call += 1
        return 0

    def _follow(self, seconds: float) -> str:
        call = self._store.add(f"calls/{self._rank}", 1)
        mine = f"{self._rank}/{call}"
        self._store.set(f"call/{mine}", "waits")
        if not self._comes(f"answer/{mine}", time.monotonic() + seconds + ANSWER_SECONDS):
            self._store.set(f"gone/{mine}", "")
            raise AbsentRanksError([0], seconds)
        answer = json.loads(self._store.get(f"answer/{mine}"))
        if answer["absent"]:
            raise AbsentRanksError(answer["absent"], seconds)
        return str(answer["text"])

    def _comes(self, key: str, deadline: float) -> bool:
        """Whether there is a value for ``key`` before the deadline."""
        left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        try:
            self._store.wait([key], left)
        except RuntimeError:  # torch's DistStoreError is one
            return bool(self._store.check([key]))
        return True
