"""Each attack at a small size, the same every time; and that each would notice what it looks for."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distckpt.format import names
from distckpt.testing.system_calls import Failure, NoCompilerError
from tests.soak.__main__ import ATTACKS, main, table
from tests.soak.attack import Attack, Attacked, Broken, Outcome, Siege
from tests.soak.calls import Calls, Life
from tests.soak.flips import Flips
from tests.soak.histories import Histories
from tests.soak.kills import Kills
from tests.soak.power import Power
from tests.soak.subject import Subject, complaints
from tests.support.damage import copied
from tests.support.preload import library
from tests.support.small_runs import attempt_folder

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    try:
        library()
    except NoCompilerError as error:
        pytest.skip(str(error))


def besiege(attack: Attack, folder: Path, count: int) -> Outcome:
    """Play so many cases, several at once, since many wait for something."""
    siege = Siege(attack, folder)
    outcome = Outcome()
    with ThreadPoolExecutor(4) as pool:
        for played in pool.map(siege.play, itertools.islice(attack.cases(random.Random(7)), count)):
            outcome.add(played)
    return outcome


def told(outcome: Outcome) -> str:
    """All that was broken."""
    return "\n".join(f"{broken.replay}\n{broken.what}" for broken in outcome.broken)


# ---- the attacks ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_process_that_is_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    outcome = besiege(Kills(lives=5), tmp_path / "soak", 2)
    assert not outcome.broken, told(outcome)
    assert outcome.tried["killed"] == 10


@pytest.mark.long
def test_a_run_whose_calls_fail_refuses_or_succeeds(tmp_path: Path) -> None:
    outcome = besiege(Calls(), tmp_path / "soak", 16)  # each kind of call once, and a disk that stays full
    assert not outcome.broken, told(outcome)
    assert {"one read fails", "one sync fails", "ENOSPC from one call on"} < outcome.tried.keys()


def test_nothing_that_was_acknowledged_is_lost_with_the_power(tmp_path: Path) -> None:
    outcome = besiege(Power(runs=("two-runs", "overlapping"), drawn=3), tmp_path / "soak", 8)
    assert not outcome.broken, told(outcome)
    assert outcome.tried.keys() == {"all kept", "all lost", "drawn"}


def test_a_byte_that_is_flipped_or_cut_off_is_refused_or_does_not_matter(tmp_path: Path) -> None:
    outcome = besiege(Flips(each=8), tmp_path / "soak", 12)
    assert not outcome.broken, told(outcome)
    assert min(outcome.tried["flipped"], outcome.tried["cut off"]) > 80


# ---- they notice ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 1, 2 and 3, which were acknowledged."""
    directory = tmp_path_factory.mktemp("kept") / "run"
    with Subject(directory, 3) as subject:
        for number in (1, 2, 3):
            subject.save(number).result(60)
    return directory


def _harmless(directory: Path) -> None:
    pass


def _lost_entry(directory: Path) -> None:
    max((directory / names.LOG).iterdir()).unlink()
    shutil.rmtree(directory / "ckpt-3")


def _lost_folder(directory: Path) -> None:
    shutil.rmtree(directory / "ckpt-2")


def _changed(directory: Path) -> None:
    shard = attempt_folder(directory, 2) / "00000-0.arrow"
    shard.write_bytes(bytes(shard.stat().st_size))


def _changed_before_it_was_saved(directory: Path) -> None:
    with Subject(directory, 3) as subject:
        subject.fill(4)
        subject.checkpoint.state["weights"][0, 0] += 1
        subject.manager.save(4).result(60)


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (_harmless, ""),
        (_lost_entry, "3 was acknowledged"),
        (_lost_folder, "ckpt-2"),
        (_changed, "00000-0.arrow"),
        (_changed_before_it_was_saved, "not all of it is from 4"),
    ],
)
def test_a_later_process_finds_what_is_broken(
    kept: Path, tmp_path: Path, harm: Callable[[Path], None], complaint: str
) -> None:
    directory = copied(kept, tmp_path)
    harm(directory)
    found = list(complaints(str(directory), [1, 2, 3], 5, 3))
    assert complaint in "\n".join(found)
    assert bool(found) is bool(complaint)


def test_a_store_that_forgets_to_sync_loses_with_the_power(tmp_path: Path) -> None:
    forgetful = Power(runs=("two-runs",), drawn=1, forgets=Failure(("sync",), 0, "pretend", times=None))
    siege = Siege(forgetful, tmp_path / "soak")
    last = f"{tmp_path}/soak/begin/two-runs {forgetful.moments['two-runs']} 1"
    outcome = siege.play(last)
    assert "6 was acknowledged, and None restored" in told(outcome)
    assert outcome.broken[0].replay == f"python -m tests.soak --only power --play '{last}'"
    assert list((tmp_path / "soak" / "0").iterdir()), "what broke is kept"


def test_a_reader_that_returns_other_bytes_is_noticed(tmp_path: Path) -> None:
    flips = Flips(each=4)
    siege = Siege(flips, tmp_path / "soak")
    directory = tmp_path / "soak" / "begin" / "one-rank"
    shutil.rmtree(directory)
    with Subject(directory, 3, max_to_keep=2) as subject:
        subject.save(1).result(60)
        subject.fill(1)  # as if it read one checkpoint for the other
        subject.manager.save(2).result(60)
    outcome = siege.play("one-rank checkpoint 0:1 5")
    assert "ckpt-2 holds 1" in told(outcome)
    assert outcome.broken[0].case == "one-rank checkpoint 0:1 5"


DONE: dict[str, list[object]] = {
    "open": ["done", None],
    "restore": ["done", 2],
    "save 3": ["done", "ckpt-3"],
    "save 4": ["done", "ckpt-4"],
}
ONE = Failure(("write",), 5)
LOOK = Failure(("read",), 5)
LASTING = Failure(("read",), 5, times=None)


@pytest.mark.parametrize(
    ("what", "failure", "complaint"),
    [
        ({}, ONE, ""),
        ({"save 3": ["StorageError", "EIO"]}, ONE, ""),
        ({"save 3": ["StorageError", "EIO"]}, LOOK, "save 3"),
        ({"save 3": ["StorageError", "EIO"], "save 4": ["SaveError", ""]}, ONE, "save 3 and save 4"),
        ({"save 3": ["StorageError", "EIO"], "save 4": ["SaveError", ""]}, LASTING, ""),
        ({"save 3": ["foreign", "KeyError"]}, LASTING, "save 3: KeyError"),
        ({"restore": ["StorageError", "EIO"]}, ONE, "restore"),
        ({"restore": ["done", 1]}, LASTING, "1 was restored"),
    ],
)
def test_what_a_run_must_not_meet(what: dict[str, list[object]], failure: Failure, complaint: str) -> None:
    life = Life({**DONE, **what})
    life.judge(failure)
    assert bool(life.broken) is bool(complaint)
    assert complaint in "\n".join(life.broken)


# ---- the command ------------------------------------------------------------------------------------------------------


def test_the_command_plays_a_case_and_cleans_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    assert (
        main(["--only", "flips", "--play", "two-ranks _log/00000000000000000002.json 5:6 1", "--folder", str(folder)])
        == 0
    )
    said = capsys.readouterr().out
    assert "flipped" in said
    assert "0 broken" in said
    assert not folder.exists()


def test_histories_are_played_by_seed_and_a_broken_rule_is_noticed(tmp_path: Path) -> None:
    outcome = Siege(Histories(), tmp_path / "sound").play("41 12")
    assert not outcome.broken, told(outcome)
    assert outcome.tried["a history"] == 12
    assert outcome.seen["Logged"] > 100
    broken = Siege(Histories(without="ignore_newest"), tmp_path / "unsound").play("22 1").broken
    assert broken
    assert {one.replay for one in broken} == {"python -m tests.soak --only histories --play '22 1'"}


def test_the_table_counts_what_broke() -> None:
    outcome = Outcome()
    outcome.tried.update(killed=1234, frightened=5)
    outcome.seen["saves acknowledged"] = 77
    outcome.broken.append(Broken("kills", "7", "killed", "3 was acknowledged"))
    shown = table([Attacked("kills", outcome, 61.2)])
    assert [list(column.cells) for column in shown.columns] == [
        ["kills, 61 s", "", "", ""],
        ["frightened", "killed", "all", "saves acknowledged"],
        ["5", "1,234", "1,239", "77"],
        ["0", "1", "1", ""],
    ]


def test_every_attack_has_a_name_of_its_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) == 15
