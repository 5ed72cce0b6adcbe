"""Small decisions that all ranks take together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from distckpt.errors import AgreementError, ranks_at_hosts
from distckpt.world import find_world

MOST_WISHES = 62
WAIT_SECONDS = 1800.0
TOLD_SECONDS = 3.0
"""How long ranks that get no answer wait for each other, to find out which of them are missing. They fail at one time."""
_SLOTS = 5
_made = itertools.count()


class Agreement:
    """Small decisions that all ranks take together, in the same step. Collective: every rank calls alike.

    A world of one needs no torch.distributed. More ranks talk over a gloo group of their own on the hosts' CPUs, made
    here beside the default group whatever backend that has, so neither NCCL nor a CUDA stream is involved.

    Args:
        rank, world_size: given, or found as a CheckpointManager finds them.
        timeout: seconds that ranks wait for each other, here and in ``any``; as long as gloo does if it is not given.

    Raises:
        ValueError: more than one rank, and torch.distributed is not initialized for as many.
        AgreementError: not all ranks make one.
    """

    def __init__(
        self, rank: int | None = None, world_size: int | None = None, *, timeout: float = WAIT_SECONDS
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError("give both rank and world_size, or neither")
        if rank is None or world_size is None:
            world = find_world()
            rank, world_size = world.rank, world.size
        self.rank = rank
        self.world_size = world_size
        self._closed = False
        self._timeout = timeout
        self._asked = 0
        self._group: Any = None
        if world_size > 1:
            self._open_group()

    def _open_group(self) -> None:
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() == self.world_size):
            raise ValueError(
                f"{self.world_size} ranks agree through torch.distributed: "
                f"call torch.distributed.init_process_group for {self.world_size} ranks first"
            )
        with self._naming_the_absent("make an Agreement, or begin a session", f"making/{next(_made)}"):
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout))
            self._values = torch.zeros(_SLOTS, dtype=torch.int64, device="cpu")
            # A rank that closed it at once, by an error, would fail others that are still being connected.
            dist.all_reduce(self._values, dist.ReduceOp.BOR, group=self._group)

    def any(self, *wishes: bool, place: int = 0) -> tuple[bool, ...]:
        """For each wish: does any rank have it. One all-reduce of 40 bytes; nothing at all in a world of one.

        ``place`` says where in its work a rank asks, a step's number say: ranks that ask in different places, or for a
        different number of wishes, are all told so. At most 62 wishes.

        Raises AgreementError, naming them, if ranks have died, have left or do not ask; or if the ranks are not in the
        same place.
        """
        if self._closed:
            raise AgreementError("this rank has left already")
        if len(wishes) > MOST_WISHES:
            raise ValueError(f"at most {MOST_WISHES} wishes at a time, not {len(wishes)}")
        if self._group is None:
            return tuple(bool(wish) for wish in wishes)
        count = len(wishes)
        mask = sum(1 << at for at, wish in enumerate(wishes) if wish)
        found, counts, not_counts, places, not_places = self._or(mask, count, ~count, place, ~place)
        if counts & not_counts or places & not_places:  # a bit that one rank has and another has not
            raise AgreementError(
                f"rank {self.rank} asks in place {place} for {count} wishes, another rank elsewhere: "
                "the ranks do not run the same steps"
            )
        return tuple(bool(found >> at & 1) for at in range(count))

    def _or(self, *values: int) -> list[int]:
        import torch
        import torch.distributed as dist

        self._asked += 1
        self._values.copy_(torch.tensor(values, dtype=torch.int64, device="cpu"))
        asking = f"{self._group.group_name}/{self._asked}"
        with self._naming_the_absent("run the same steps with the same hooks, and ask alike", asking):
            dist.all_reduce(self._values, dist.ReduceOp.BOR, group=self._group)
        return [int(value) for value in self._values.tolist()]

    @contextmanager
    def _naming_the_absent(self, duty: str, occasion: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            absent = self._absent(occasion)
            whom = f" from {ranks_at_hosts(absent, {})}, which" if absent else ": another rank"
            raise AgreementError(
                f"rank {self.rank} gets no answer{whom} has died, has left or does not come. "
                f"Every rank must {duty}: {error}"
            ) from error

    def _absent(self, occasion: str) -> list[int]:
        """Ranks that do not say within a moment that they get no answer either; empty if that cannot be found out."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not in its __all__
        from torch.distributed.distributed_c10d import _get_default_store

        deadline = time.monotonic() + TOLD_SECONDS
        try:
            store = PrefixStore(f"distckpt-agreement/{occasion}", _get_default_store())
            store.set(str(self.rank), "")
            while not store.check([str(rank) for rank in range(self.world_size)]) and time.monotonic() < deadline:
                time.sleep(0.05)
            return [rank for rank in range(self.world_size) if not store.check([str(rank)])]
        except RuntimeError:  # rank 0, which has the store, is gone
            return []

    def close(self) -> None:
        """Leave. Ranks that still ask get an AgreementError instead of waiting."""
        self._closed = True
        if self._group is None:
            return
        import torch.distributed as dist

        group, self._group = self._group, None
        if dist.is_initialized():
            dist.destroy_process_group(group)
