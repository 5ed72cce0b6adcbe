"""What the demo claims, each checked: a claim that does not hold ends the demo with an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from record import Commit, Digests, Record
from witness import digest

import distckpt

LOSS_TOLERANCE = 1e-3
"""Sums over 2 and over 3 ranks are rounded differently, and training makes the differences grow a little."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, and what was found."""

    claim: str
    holds: bool
    found: str


def equal_digests(expected: Digests, found: Digests) -> list[str]:
    """The keys whose tensors or values differ, or that only one side has."""
    one = {**expected.tensors, **expected.values}
    other = {**found.tensors, **found.values}
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def check_crash(record: Record, step: int, rank: int, committed: list[str]) -> Check:
    """The save of ``step`` was asked for by the others, its rank died in it, and it was not committed."""
    asked = sorted(save["rank"] for save in record.saves if save["step"] == step)
    names = [commit.name for commit in record.commits]
    holds = rank not in asked and f"ckpt-{step}" not in names and names == committed
    found = f"committed: {', '.join(names) or 'nothing'}; ckpt-{step} was in flight and is not among them"
    return Check(f"killing rank {rank} during a save commits nothing broken and loses nothing committed", holds, found)


def check_restored(record: Record, commit: Commit, world_size: int) -> Check:
    """Every rank of the resumed run restored the newest committed checkpoint."""
    starts = [start for start in record.starts if start["world_size"] == world_size]
    restored = {start["restored"] for start in starts}
    holds = len(starts) == world_size and restored == {commit.path}
    found = f"{len(starts)} ranks restored {', '.join(sorted(str(path).rpartition('/')[2] for path in restored))}"
    return Check(f"{world_size} ranks resume from the newest committed checkpoint", holds, found)


def check_bits(record: Record, commit: Commit, world_size: int) -> Check:
    """What the resumed run had in memory after the restore is what the first had when it called save."""
    before = record.digests("saved", commit.number, commit.world_size)
    after = record.digests("restored", commit.number, world_size)
    differing = equal_digests(before, after)
    found = f"{len(before.tensors)} tensors and {len(before.values)} values compared, {len(differing)} differ"
    claim = f"restored on {world_size} ranks bit for bit what {commit.world_size} ranks had saved"
    return Check(claim, bool(before.tensors) and not differing, found + (f": {differing[:3]}" if differing else ""))


def check_samples(record: Record, batch: int) -> Check:
    """No sample was left out or taken twice: after step n, n batches have been taken, whoever took them."""
    wrong = [event["step"] for event in record.steps if event["samples"] != event["step"] * batch]
    found = f"{len(record.steps)} steps of {batch} samples, {len(wrong)} with another number taken"
    return Check("the data goes on where it stopped, shared anew among the ranks", not wrong, found)


def check_curve(record: Record, first: int, last: int) -> Check:
    """Steps that were lost and trained again on the same samples have the same loss, up to rounding."""
    twice: dict[int, list[float]] = {step: [] for step in range(first, last + 1)}
    for event in record.steps:
        if event["step"] in twice:
            twice[event["step"]].append(event["loss"])
    gap = max(abs(losses[0] - losses[-1]) for losses in twice.values())
    holds = all(len(losses) == 2 for losses in twice.values()) and gap < LOSS_TOLERANCE
    found = f"largest difference {gap:.1e} nats a byte (allowed: {LOSS_TOLERANCE:g}, for other rounding)"
    return Check(
        f"steps {first} to {last}, trained before the kill and again after it, have the same loss", holds, found
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """How many tensors of a checkpoint were read and compared with what the ranks had, and which of them differ."""

    compared: int
    differing: tuple[str, ...]


def read_again(record: Record, commit: Commit) -> Reading:
    """A checkpoint that is still there, loaded whole into this one process."""
    state = distckpt.load(commit.path)
    tensors = {f"model.{name}": digest(tensor) for name, tensor in state["model"].items()}
    for name, fields in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.state.{name}.{field}": digest(tensor) for field, tensor in tensors_of(fields).items()}
    return compare(record, commit, tensors, everything=True)


def tensors_of(fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those of an optimizer's state that are tensors."""
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def read_by_evaluation(record: Record, commit: Commit) -> Reading:
    """The model as the evaluation loaded it while training went on; nothing if it passed this one over."""
    evaluation = record.evaluation(commit)
    return compare(record, commit, evaluation["tensors"] if evaluation else {}, everything=False)


def compare(record: Record, commit: Commit, tensors: dict[str, str], *, everything: bool) -> Reading:
    """Digests of what was read against those that the ranks wrote down when they saved."""
    saved = record.digests("saved", commit.number, commit.world_size).tensors
    keys = saved.keys() | tensors.keys() if everything else tensors.keys()
    return Reading(len(keys), tuple(sorted(key for key in keys if saved.get(key) != tensors.get(key))))


def check_readings(what: str, readings: list[Reading]) -> Check:
    """All of them the same, and not none."""
    compared, differing = sum(one.compared for one in readings), [key for one in readings for key in one.differing]
    found = f"{compared} tensors compared, {len(differing)} differ" + (f": {differing[:3]}" if differing else "")
    return Check(what, compared > 0 and not differing, found)
