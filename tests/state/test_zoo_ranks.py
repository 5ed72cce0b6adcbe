"""G9 on many ranks: two that hold the same, what lives on ranks, and FSDP2 on other numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.state.zoo import ENTRIES
from tests.state.zoo.observe import differences
from tests.state.zoo.ranks import ELASTIC, RANK_ENTRIES
from tests.support.gang import Gang

ALIKE = [name for name, entry in ENTRIES.items() if entry.two_ranks]
SPECIAL = [name for name, one in RANK_ENTRIES.items() if (2, 2) in one.worlds]
SHARDED = [name for name, one in RANK_ENTRIES.items() if one.worlds == ELASTIC]

pytestmark = pytest.mark.timeout(300)

Batch = Callable[[], list[dict[str, Any]]]
Played = Callable[..., list[str]]


class Batches:
    """Runs each batch of entries once, on all of its ranks, for the first test that asks; keeps how it failed too."""

    def __init__(self) -> None:
        self._results: dict[str, list[dict[str, Any]] | BaseException] = {}

    def result(self, name: str, run: Batch) -> list[dict[str, Any]]:
        """What every rank said, in order of rank."""
        if name not in self._results:
            try:
                self._results[name] = run()
            except BaseException as error:
                self._results[name] = error
                raise
        found = self._results[name]
        if isinstance(found, BaseException):
            pytest.fail(f"the batch {name} has failed before: {found}")
        return found


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches()


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest) -> Played:
    """The entries with which a test of this module is going to run, in those worlds if it runs in several."""

    def of(test: str, *worlds: tuple[int, int]) -> list[str]:
        items = [item for item in request.session.items if item.nodeid.partition("::")[2].startswith(f"{test}[")]
        given = [item.callspec.params for item in items if isinstance(item, pytest.Function)]
        return list(dict.fromkeys(each["name"] for each in given if not worlds or each["worlds"] in worlds))

    return of


@pytest.fixture(scope="module")
def gang1(ray_address: str) -> Iterator[Gang]:
    with Gang(1, {"RAY_ADDRESS": ray_address}) as gang:
        yield gang


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo-on-ranks")


def test_the_first_manager_of_a_process_draws_no_random_numbers(ray_address: str, tmp_path: Path) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        assert gang.run("ranks.zoo:first_manager", directory=str(tmp_path)) == [[], []]


def test_training_draws_its_own_random_numbers_while_the_first_manager_opens(ray_address: str, tmp_path: Path) -> None:
    with Gang(2, env={"RAY_ADDRESS": ray_address}) as gang:
        assert gang.run("ranks.zoo:drawn_meanwhile", directory=str(tmp_path)) == [True, True]


@pytest.mark.wide(16)
@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_that_hold_the_same_get_it_back(
    gang2: Gang, batches: Batches, folder: Path, played: Played, name: str
) -> None:
    names = played("test_two_ranks_that_hold_the_same_get_it_back")
    results = batches.result(
        "alike", lambda: gang2.run("ranks.zoo:alike", directory=str(folder / "alike"), names=names)
    )
    assert [result[name] for result in results] == [[], []]


@pytest.mark.parametrize("name", SPECIAL)
def test_what_lives_on_ranks_comes_back_or_is_refused_by_name(
    gang2: Gang, batches: Batches, folder: Path, name: str
) -> None:
    results = batches.result(
        "special", lambda: gang2.run("ranks.zoo:special", directory=str(folder / "special"), names=SPECIAL)
    )
    assert [result[name] for result in results] == [[], []]


@pytest.fixture(scope="module")
def gangs(gang1: Gang, gang2: Gang, gang3: Gang) -> dict[int, Gang]:
    return {1: gang1, 2: gang2, 3: gang3}


@pytest.mark.wide(4)
@pytest.mark.parametrize("worlds", ELASTIC, ids=lambda worlds: f"{worlds[0]}-to-{worlds[1]}")
@pytest.mark.parametrize("name", SHARDED)
def test_another_number_of_ranks_goes_on_as_if_it_had_never_stopped(
    gangs: dict[int, Gang], batches: Batches, folder: Path, played: Played, name: str, worlds: tuple[int, int]
) -> None:
    test = "test_another_number_of_ranks_goes_on_as_if_it_had_never_stopped"
    saving, restoring = worlds
    saved, restored = played(test, *(each for each in ELASTIC if each[0] == saving)), played(test, worlds)
    directory = str(folder / f"sharded-{saving}")
    before = batches.result(
        f"save on {saving}",
        lambda: gangs[saving].run("ranks.zoo:sharded_save", directory=directory, names=saved),
    )
    after = batches.result(
        f"restore {saving} on {restoring}",
        lambda: gangs[restoring].run("ranks.zoo:sharded_restore", directory=directory, names=restored),
    )
    assert [one[name]["failed"] for one in (*before, *after)] == [[]] * (saving + restoring)
    for when in ("restored", "after") if RANK_ENTRIES[name].exact else ("restored",):
        wanted = before[0][name][when]
        if not RANK_ENTRIES[name].exact:
            wanted = {key: text for key, text in wanted.items() if ".group" not in key}
        for rank, one in enumerate(after):
            found = {key: text for key, text in one[name][when].items() if key in wanted or ".group" not in key}
            asked = {key: text for key, text in wanted.items() if rank == 0 or not key.startswith("losses")}
            assert differences(asked, found) == []
