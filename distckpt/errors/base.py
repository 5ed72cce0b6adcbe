"""What all errors have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def ranks_at_hosts(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """``rank 3 (host-1), rank 7 (host-2)``: the first 16 of them, with their hosts as far as they are known."""
    return some([f"rank {rank} ({hosts[rank]})" if hosts.get(rank) else f"rank {rank}" for rank in ranks], most=16)


class DistckptError(Exception):
    """Base of every error that distckpt raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[DistckptError], args: tuple[Any, ...], fields: dict[str, Any]) -> DistckptError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


def some(names: Sequence[str], count: int = 0, most: int = 8) -> str:
    """The first ``most`` of them, and how many more there are: ``count`` in all, where not all were given."""
    more = max(count, len(names)) - most
    return ", ".join(list(names)[:most]) + (f" and {more} more" if more > 0 else "")
