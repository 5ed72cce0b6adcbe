"""The attacks on directories in object stores at a small size, the same every time; and that they would notice."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.soak.attack import Outcome, Siege
from tests.soak.disturbed import Told, begin, left, left_outside
from tests.soak.kills import Kills
from tests.soak.requests import TROUBLES, Requests
from tests.soak.stores import Stores
from tests.support.damage import flip
from tests.support.part import Part

pytestmark = pytest.mark.timeout(300)

AT_ONCE = 4


def besiege(siege: Siege, cases: list[str]) -> Outcome:
    """Play these, several at once, for many wait for something."""
    outcome = Outcome()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for played in pool.map(siege.play, cases):
            outcome.add(played)
    assert not outcome.broken, "\n".join(f"{broken.replay}\n{broken.what}" for broken in outcome.broken)
    return outcome


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_whatever_becomes_of_any_request_of_a_run_nothing_is_lost(
    protocol: str, tmp_path: Path, seed: int, part: Part
) -> None:
    attack = Requests(protocol)
    siege = Siege(attack, tmp_path / "soak")
    every = list(attack.sample(random.Random(seed)))
    requests = [one.split(" ") for case in every for one in case.split("+")]
    assert {trouble for _, _, trouble, _ in requests} == set(TROUBLES)
    assert {kind for kind, *_ in requests} == set(attack.counted)
    played = part.of(every, 5)
    outcome = besiege(siege, played)
    # What several threads do may come in another order, and then there is one less of a kind.
    assert outcome.tried.total() >= 0.9 * sum(case.count("+") + 1 for case in played)


@pytest.mark.long
def test_whatever_call_of_a_store_goes_wrong_nothing_is_lost_on_any_kind(tmp_path: Path, seed: int, part: Part) -> None:
    attack = Stores()
    siege = Siege(attack, tmp_path / "soak")
    wanted = {(kind, call.operation) for kind, calls in attack.counted.items() for call in calls}
    in_turn = list(itertools.islice(attack.cases(random.Random(seed)), len(wanted)))
    of_each = [[case for case in in_turn if case.startswith(f"{kind} ")] for kind in attack.kinds]
    outcome = besiege(siege, [case for cases in of_each for case in part.of(cases, max(1, len(cases) // 2))])
    assert {tried.partition(", ")[0] for tried in outcome.tried} == set(attack.kinds)


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["gs", "moto"])
def test_a_process_that_is_killed_while_it_saves_to_a_bucket_loses_nothing(protocol: str, tmp_path: Path) -> None:
    attack = Kills(protocol, lives=2)
    siege = Siege(attack, tmp_path / "soak")
    outcome = besiege(siege, [next(attack.cases(random.Random(3)))])
    assert outcome.tried["killed"] == 2


# ---- they notice ------------------------------------------------------------------------------------------------------


def test_what_is_lost_or_damaged_after_a_run_is_noticed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    begin(directory, 3)
    fine = Told(2, [])
    assert list(left_outside(str(directory), fine)) == []
    assert "1000003 was acknowledged" in "".join(left_outside(str(directory), Told(2, [1_000_003])))
    assert list(left(str(directory), fine, 3, hidden=lambda: ["a part is left"])) == ["a part is left"]
    shard = next(directory.glob("ckpt-2/*/*.arrow"))
    flip(shard, shard.stat().st_size // 2)
    assert "Damaged" in "".join(left_outside(str(directory), fine))


def test_a_run_that_was_to_do_all_and_did_not_is_noticed() -> None:
    assert Told(2, [1_000_003, 1_000_004]).is_undisturbed
    assert not Told(1, [1_000_003, 1_000_004]).is_undisturbed
    assert not Told(2, [1_000_004]).is_undisturbed
    assert not Told(2, [1_000_003, 1_000_004], ["refused"]).is_undisturbed
