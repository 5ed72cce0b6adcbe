"""Plans and descriptions that outlive one save, so that saving an unchanged structure plans nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distckpt.coordinator.machine.actions import Plan
from distckpt.coordinator.messages import Join

HELD_PLANS = 4


@dataclass(frozen=True, slots=True)
class HeldPlan:
    """A plan and the digest of every rank's description that it was made from."""

    plan: Plan
    digests: Mapping[int, str]

    def covers(self, rank: int, join: Join) -> bool:
        """Whether the rank that joins staged under this very plan, and still holds what it was made from."""
        return join.plan == self.plan.plan_id and self.digests.get(rank) == join.digest

    def fits(self, joins: Mapping[int, Join]) -> bool:
        """Whether it was made from exactly these descriptions, and nobody has staged under another."""
        return len(self.digests) == len(joins) and all(
            self.digests.get(rank) == join.digest and (not join.staged or join.plan == self.plan.plan_id)
            for rank, join in joins.items()
        )


class Plans:
    """The latest few plans, and each rank's latest description."""

    def __init__(self) -> None:
        self._held: dict[str, HeldPlan] = {}
        self._descriptions: dict[int, tuple[str, bytes]] = {}

    def add(self, plan: Plan, digests: Mapping[int, str]) -> HeldPlan:
        """Hold a plan; the one that was held longest makes room for it."""
        self._held.pop(plan.plan_id, None)
        held = self._held[plan.plan_id] = HeldPlan(plan, digests)
        if len(self._held) > HELD_PLANS:
            del self._held[next(iter(self._held))]
        return held

    def staged_under(self, rank: int, join: Join) -> HeldPlan | None:
        """The plan that a staged rank names, if it is held and still covers what the rank holds."""
        held = self._held.get(join.plan) if join.staged else None
        return held if held is not None and held.covers(rank, join) else None

    def follows_one(self, rank: int, digest: str) -> bool:
        """Whether a held plan was made from this description of ``rank``: then copies were compared."""
        return any(held.digests.get(rank) == digest for held in self._held.values())

    def fitting(self, joins: Mapping[int, Join]) -> HeldPlan | None:
        """A held plan that serves a round as it is, newest first, or None."""
        return next((held for held in reversed(self._held.values()) if held.fits(joins)), None)

    def describe(self, rank: int, digest: str, description: bytes) -> None:
        """Keep the description of ``rank``; the one before it goes."""
        self._descriptions[rank] = (digest, description)

    def description(self, rank: int, digest: str) -> bytes | None:
        """The description of ``rank`` with that digest, if it is the latest one."""
        held = self._descriptions.get(rank)
        return held[1] if held is not None and held[0] == digest else None

    def clear(self) -> None:
        """Another run begins: what its ranks hold has yet to be described and compared."""
        self._held.clear()
        self._descriptions.clear()
