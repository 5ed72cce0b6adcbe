"""The attack on readers at a small size; and that it would notice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from distckpt.directory.leases import Leased, Leases
from distckpt.storage import MemoryStore, open_store
from tests.soak.attack import Outcome, Siege
from tests.soak.evaluation import Evaluation, InMemory, happenings, played, wrong
from tests.support.small_runs import mount, mounting

pytestmark = pytest.mark.timeout(300)


@pytest.mark.long
@pytest.mark.parametrize(
    ("protocol", "on_lag", "commits"),
    [("", "hold", 60), ("", "block", 24), ("memory", "skip", 100), ("moto", "hold", 12)],
)
def test_slow_readers_lose_nothing_and_find_what_was_saved(
    protocol: str, on_lag: str, commits: int, tmp_path: Path
) -> None:
    siege = Siege(Evaluation(protocol, commits), tmp_path / "soak")
    outcome = siege.play(f"{commits} {on_lag} 7")
    assert not outcome.broken, said(outcome)
    assert outcome.seen["saved"] == commits
    assert 0 < outcome.seen["acknowledged"] <= commits
    assert outcome.seen["read"] > 0


def said(outcome: Outcome) -> str:
    """All that was broken."""
    return "\n".join(f"{broken.replay}\n{broken.what}" for broken in outcome.broken)


def test_a_trainer_that_does_not_look_at_leases_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "read", lambda self: Leased(frozenset()))
    store = MemoryStore()
    with mounting():
        found = list(played(InMemory(tmp_path, mount(store), None, store), "skip", 100, random.Random(3)))
    found += [detail for what, detail in happenings(tmp_path) if what == "broken"]
    assert "missing" in "\n".join(found)


@pytest.mark.long
def test_what_is_lost_or_counts_twice_in_a_group_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    outcome = Evaluation(commits=5).play("5 hold 1", folder)
    assert not outcome.broken, said(outcome)
    happened, store = happenings(folder), open_store(folder / "run")
    assert list(wrong(store, happened, 5)) == []
    twice = [*happened, ("acknowledged", 3), ("acknowledged", 3)]
    assert next(wrong(store, twice, 5)).startswith("3 was acknowledged")
    assert "6 was saved 0 times" in list(wrong(store, happened, 6))
    assert "5 of 6 were acknowledged, 0 missed, 0 skipped" in list(wrong(store, happened, 6))
