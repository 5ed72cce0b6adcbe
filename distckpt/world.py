"""Which rank this process is, how many there are, and how rank 0 tells the others something before Ray is up."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any


def _alone(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``. ``share`` returns rank 0's text on every rank; a collective where size > 1.

    ``token`` names this incarnation of the job where the environment gives it a name, else it is None and rank 0
    invents one.
    """

    rank: int
    size: int
    share: Callable[[str], str] | None = field(default=_alone, repr=False)
    token: str | None = None
    host: str = field(default_factory=socket.gethostname)
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not among {self.size} ranks")


def find_world(rank: int | None = None, world_size: int | None = None, run_id: str | None = None) -> World:
    """The world that was given, else torch.distributed's, Ray Train's, torchrun's variables', or a world of one.

    With ``rank`` and ``world_size`` given for more than one rank and no torch.distributed, ``run_id`` must name the
    incarnation of the job: the same text on every rank, another one after every restart. ValueError otherwise.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is not None and world_size is not None:
        return _given_world(rank, world_size, run_id)
    return _torch_world() or _ray_train_world() or _torchrun_world(run_id) or World(0, 1, token=run_id)


def new_token() -> str:
    """A name for an incarnation of the job that nobody has used before."""
    return uuid.uuid4().hex


def _given_world(rank: int, world_size: int, run_id: str | None) -> World:
    if world_size == 1:
        return World(rank, 1, token=run_id)
    found = _torch_world()
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


def _torch_world() -> World | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() == 1:
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size(), _broadcast, local_rank=_local_rank())


def _broadcast(text: str) -> str:
    import torch
    import torch.distributed as dist

    accelerator = torch.accelerator.current_accelerator() if "nccl" in dist.get_backend() else None
    device = accelerator if accelerator is not None else torch.device("cpu")
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    dist.broadcast(data, 0)
    return bytes(data.cpu().tolist()).decode()


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

    return World(rank, size, broadcast_from_rank_zero, local_rank=context.get_local_rank())


def _torchrun_world(run_id: str | None) -> World | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return World(0, 1, token=run_id)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return World(rank, size, _agent_store(rank), run_id, local_rank=_local_rank())
    if run_id is None:
        raise ValueError("call torch.distributed.init_process_group before distckpt, or give run_id")
    return World(rank, size, None, run_id, local_rank=_local_rank())


_shared = itertools.count(1)
"""Numbers what this process has shared through the agent's store, whose keys must never be used twice."""


def _agent_store(rank: int) -> Callable[[str], str]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=300))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def share(text: str) -> str:
        key = f"distckpt/{restart}/{next(_shared)}"
        if rank == 0:
            store.set(key, text)
        return bytes(store.get(key)).decode()

    return share
