"""A directory whose log has pages is a directory like any other; a page that is damaged or gone is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

import distckpt
from distckpt.cli import main
from distckpt.coordinator.machine.actions import CollectGarbage
from distckpt.coordinator.shell.housekeeping import collect_garbage
from distckpt.directory.by_hand import Hand
from distckpt.directory.collect import PAGE, Survey, delete
from distckpt.directory.garbage import FAILED_SECONDS, GARBAGE_SECONDS, Bounds, Leftover, Watch, dropped_pages
from distckpt.directory.groups import read_groups, waiting, wanted_by
from distckpt.directory.lease import hold
from distckpt.directory.locate import locate
from distckpt.directory.log import KEEP_ENTRIES, Tail, prune, read_tail
from distckpt.directory.newest import newest_committed
from distckpt.directory.pages import known, read_page, readable, whole, write_page
from distckpt.directory.pins import pin, unpin
from distckpt.directory.reports import write_report
from distckpt.errors import CheckpointNotFoundError, DamagedError, StorageError
from distckpt.format import names
from distckpt.format.json.log import CheckpointRecord, State
from distckpt.storage import LocalStore
from distckpt.testing.faults import Call, Fault
from distckpt.testing.faulty import FaultyStore
from tests.support.checkpoints import new_attempt, put_manifest
from tests.support.clock import Clock
from tests.support.damage import flip
from tests.support.small_runs import Trainer, assert_loads, settled

KEPT = 330
OLD = 1_000_000_000.0


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("paged")
    store = LocalStore(directory)
    state = State(run=1, run_token="gone", origin="o", last_preserved_timestamp=1.0)
    for number in range(1, KEPT + 1):
        state, (record,) = state.counted(put_manifest(store, number, new_attempt()))
        state = msgspec.structs.replace(state, active=(*state.active, record))
    preserved = tuple(state.active[: KEPT // 2])
    state = msgspec.structs.replace(state, active=state.active[KEPT // 2 :], preserved=preserved)
    Hand(store, Tail(0, None), "test").write("claim", state, OLD)
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    def copy(source: str, target: str) -> None:
        (os.link if "/ckpt-" in source else shutil.copyfile)(source, target)

    return shutil.copytree(template, tmp_path / "run", copy_function=copy)


def pages_of(directory: Path) -> list[Path]:
    return sorted((directory / names.PAGES).glob("*"))


def page_with(directory: Path, number: int) -> Path:
    """The page that has a number."""
    [page] = [page for page in read_tail(LocalStore(directory)).head.pages if page.may_have_number(number)]
    return directory / names.page_path(page.id)


def record_of(directory: Path, number: int) -> CheckpointRecord:
    state = read_tail(LocalStore(directory)).having_numbers(number)
    return next(record for record in state.newest_first() if record.number == number)


def numbers(directory: Path) -> list[int]:
    return sorted(record.number for record in read_tail(LocalStore(directory)).state.alive().values())


def remove(page: Path) -> None:
    page.unlink()


def cut(page: Path) -> None:
    page.write_bytes(page.read_bytes()[:-100])


def flipped(page: Path) -> None:
    flip(page, 200)


def exchanged(page: Path) -> None:
    other = next(path for path in page.parent.iterdir() if path != page)
    page.write_bytes(other.read_bytes())


# ---- as if there were none --------------------------------------------------------------------------------------------


def test_what_is_newest_is_known_without_a_page(directory: Path) -> None:
    store = LocalStore(directory)
    assert len(read_tail(store).head.pages) == 2
    shutil.rmtree(directory / names.PAGES)
    assert distckpt.latest_checkpoint(directory) == f"{directory}/ckpt-{KEPT}"
    assert next(distckpt.checkpoints_iterator(directory, timeout=0)) == f"{directory}/ckpt-{KEPT}"
    assert locate(directory).manifest.number == KEPT
    state = distckpt.get_checkpoint_state(directory)
    assert state is not None
    assert state.all_model_checkpoint_paths[-1] == state.model_checkpoint_path
    assert 32 <= len(state.all_model_checkpoint_paths) < 160


def test_an_old_one_is_opened_by_its_path_from_its_page_alone(directory: Path) -> None:
    remove(page_with(directory, KEPT // 2 + 5))
    assert locate(directory / "ckpt-3").manifest.number == 3
    with pytest.raises(CheckpointNotFoundError, match="not a committed checkpoint"):
        locate(directory / "ckpt-999")


def test_if_the_newest_were_deleted_by_hand_all_pages_are_looked_through(directory: Path) -> None:
    for number in range(20, KEPT + 1):
        shutil.rmtree(directory / f"ckpt-{number}")
    newest = newest_committed(LocalStore(directory))
    assert newest is not None
    assert newest.number == 19


def test_ls_lists_all_and_a_state_is_whole_for_who_knows_nothing_of_pages(directory: Path) -> None:
    assert numbers(directory) == list(range(1, KEPT + 1))
    result = call("ls", directory, "--json")
    assert result.exit_code == 0
    listed = json.loads(result.stdout)["checkpoints"]
    assert [one["number"] for one in listed] == list(range(1, KEPT + 1))
    assert [one["number"] for one in listed if "preserved" in one["state"]] == list(range(1, KEPT // 2 + 1))


def test_leases_and_pins_hold_what_is_in_pages(directory: Path) -> None:
    store, record = LocalStore(directory), record_of(directory, 7)
    with hold(store, record.attempt, "a reader"):
        pass
    pin(store, record.attempt, "somebody", "", 1.0)
    assert unpin(store, record.attempt)
    with pytest.raises(CheckpointNotFoundError), hold(store, new_attempt(), "a reader"):
        pass


def test_a_group_that_begins_with_the_earliest_gets_what_is_in_pages(directory: Path) -> None:
    with distckpt.watch(directory, group="eval", mode="all", start="earliest", timeout=0) as watch:
        for number in (1, 2):
            one = next(watch)
            assert one.number == number
            one.ack()
    state = read_groups(LocalStore(directory))["eval"]
    log = read_tail(LocalStore(directory)).head
    assert [one.number for one in waiting(state, wanted_by(LocalStore(directory), log, [state]))][:2] == [3, 4]


def test_reports_and_metrics_of_what_is_in_pages_are_shown(directory: Path) -> None:
    record = record_of(directory, 7)
    write_report(LocalStore(directory), record.attempt, {"loss": 0.5})
    listed = json.loads(call("ls", directory, "--json").stdout)["checkpoints"]
    assert [one["number"] for one in listed if one["metrics"] == {"loss": 0.5}] == [7]
    with Trainer(directory, max_to_keep=None) as trainer:
        trainer.saved(KEPT + 1)
    assert record_of(directory, 7).metrics == {"loss": 0.5}


def test_rm_pin_and_unpin_find_what_is_in_pages(directory: Path) -> None:
    assert call("rm", directory / "ckpt-7", directory / f"ckpt-{KEPT - 100}", "-y").exit_code == 0
    assert numbers(directory) == [number for number in range(1, KEPT + 1) if number not in (7, KEPT - 100)]
    assert call("pin", directory / "ckpt-8").exit_code == 0
    assert call("unpin", directory / "ckpt-8").exit_code == 0
    with Trainer(directory, max_to_keep=None) as trainer:
        trainer.pin(9)
    assert record_of(directory, 9).pinned
    assert call("unpin", directory / "ckpt-9", "--force").exit_code == 0
    assert not record_of(directory, 9).pinned


def test_nothing_of_a_page_is_a_stray_or_garbage(directory: Path) -> None:
    assert "nothing to adopt" in call("adopt", directory).output or call("adopt", directory, "--json").exit_code == 0
    assert json.loads(call("adopt", directory, "--json").stdout)["checkpoints"] == []
    assert json.loads(call("gc", directory, "--json", "--force").stdout)["garbage"] == []
    assert numbers(directory) == list(range(1, KEPT + 1))


def test_a_job_goes_on_and_one_that_keeps_fewer_retires_what_is_in_pages(directory: Path, tmp_path: Path) -> None:
    with Trainer(directory, max_to_keep=None) as trainer:
        assert len(trainer.manager.checkpoints) == KEPT - KEPT // 2
        trainer.saved(KEPT + 1)
        trainer.saved(KEPT // 2 + 7)
    assert KEPT // 2 + 7 in numbers(directory)
    assert len(read_tail(LocalStore(directory)).head.active) < 160
    with Trainer(directory, max_to_keep=3) as trainer:
        trainer.saved(KEPT + 2)
        trainer.manager.wait()
        assert [Path(path).name for path in trainer.manager.checkpoints][-1] == f"ckpt-{KEPT + 2}"
    settled(directory)
    assert numbers(directory) == [*range(1, KEPT // 2 + 1), KEPT // 2 + 7, KEPT + 1, KEPT + 2]
    assert len(read_tail(LocalStore(directory)).head.preserved) < 160
    for number in (KEPT // 2 + 7, KEPT + 1, KEPT + 2):
        assert_loads(directory / f"ckpt-{number}", number)
    assert len(list(directory.glob("ckpt-*/*/manifest.json"))) == KEPT // 2 + 3


# ---- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [remove, cut, flipped, exchanged])
def test_a_page_that_is_not_as_it_was_is_named_by_all_who_need_it(
    directory: Path, harm: Callable[[Path], None]
) -> None:
    page = page_with(directory, 7)
    harm(page)
    store = LocalStore(directory)
    [lost] = [one for one in read_tail(store).head.pages if one.may_have_number(7)]
    with pytest.raises(DamagedError, match=page.stem):
        assert read_tail(store).state
    with pytest.raises(DamagedError, match=page.stem):
        locate(directory / "ckpt-7")
    with pytest.raises(DamagedError, match=page.stem), hold(store, lost.attempts[0], "a reader"):
        pass
    listed = call("ls", directory, "--json")
    assert listed.exit_code == 1
    assert page.stem in json.loads(listed.stdout)["unreadable"][0]
    assert [one["number"] for one in json.loads(listed.stdout)["checkpoints"]][-1] == KEPT
    assert page.stem in call("ls", directory).output.replace("\n", "")
    assert any(page.stem in report["path"] for report in json.loads(call("verify", directory, "--json").stdout))
    refused = call("rm", directory / "ckpt-7", "-y")
    assert refused.exit_code != 0
    assert page.stem in refused.output
    assert locate(directory / f"ckpt-{KEPT - 100}").manifest.number == KEPT - 100


def test_what_a_lost_page_may_name_is_not_collected_and_not_adopted(directory: Path) -> None:
    remove(page_with(directory, 7))
    store = LocalStore(directory)
    stray = put_manifest(store, 999, new_attempt())
    state = read_tail(store).head
    attempts = known(store, state)
    lost = next(page for page in state.pages if page.may_have_number(7))
    assert all(attempt in attempts for attempt in lost.attempts)
    assert stray.attempt not in attempts
    action = CollectGarbage("ckpt", state.known(), frozenset(), 1 << 40, urgent=True, pages=state.pages)
    collect_garbage(store, action, 0.0, Watch(store))
    assert len(list(directory.glob(f"ckpt-*/*/{names.MANIFEST}"))) == KEPT + 1
    assert json.loads(call("gc", directory, "--json", "--force").stdout)["garbage"] == []
    assert [one["checkpoint"] for one in json.loads(call("adopt", directory, "--json").stdout)["checkpoints"]] == [
        "ckpt-999"
    ]


# ---- pages that nobody needs --------------------------------------------------------------------------------------------


def dropped(store: LocalStore, epoch: int, *said: str, watch: Watch | None = None) -> list[Leftover]:
    return dropped_pages(Bounds((), frozenset(), epoch), GARBAGE_SECONDS, watch or Watch(store), said)


def test_a_page_goes_once_no_entry_in_the_log_refers_to_it_and_readers_of_gone_ones_had_time(directory: Path) -> None:
    store, clock = LocalStore(directory), Clock()
    tail = read_tail(store)
    hand = Hand(store, tail, "test")
    opened = whole(store, tail.head)
    small = msgspec.structs.replace(opened, active=opened.active[-3:], preserved=(), retiring=())
    for number in range(KEEP_ENTRIES):
        hand.write("claim", small, 1.0 + number)
    assert dropped(store, 1 << 40) == []  # the first entry is still there
    prune(store, read_tail(store).seq + 10)
    assert len(dropped(store, 1 << 40)) == len(pages_of(directory)) == 2
    survey = Survey(store, GARBAGE_SECONDS, clock)
    survey.look()
    clock.now += FAILED_SECONDS - 1
    assert not [one for one in survey.look().found if one.kind == PAGE]
    clock.now += 1
    found = [one for one in survey.look().found if one.kind == PAGE]
    assert {one.left.path for one in found} == {f"{names.PAGES}/{page.name}" for page in pages_of(directory)}
    assert delete(found) == {}
    assert pages_of(directory) == []


def test_a_coordinator_watches_a_page_before_it_goes_however_old_the_store_says_it_is(directory: Path) -> None:
    store, clock = LocalStore(directory), Clock()
    write_page(store, f"e0-{'a' * 32}", "active", (read_tail(store).head.active[0],))
    [page] = [path for path in pages_of(directory) if path.stem.startswith("e0-")]
    os.utime(page, (1.0, 1.0))
    state, watch = read_tail(store).head, Watch(store, clock)
    action = CollectGarbage("ckpt", state.known(), frozenset(), 1 << 40, pages=state.pages)
    collect_garbage(store, action, GARBAGE_SECONDS, watch)
    assert page.exists()
    clock.now += FAILED_SECONDS
    collect_garbage(store, action, GARBAGE_SECONDS, watch)
    assert not page.exists()
    assert {path.stem for path in pages_of(directory)} == {one.id for one in state.pages}


def test_what_the_newest_coordinator_wrote_stays_until_it_says_so(directory: Path) -> None:
    store = LocalStore(directory)
    epoch = read_tail(store).entry.epoch  # type: ignore[union-attr]
    page = f"e{epoch}-{'a' * 32}"
    write_page(store, page, "active", (read_tail(store).head.active[0],))
    assert dropped(store, epoch) == []
    assert [left.path for left in dropped(store, epoch, page)] == [names.page_path(page)]
    assert [left.path for left in dropped(store, epoch + 1)] == [names.page_path(page)]


def test_no_page_goes_while_an_entry_cannot_be_read(directory: Path) -> None:
    store = LocalStore(directory)
    write_page(store, f"e0-{'a' * 32}", "active", (read_tail(store).head.active[0],))
    assert len(dropped(store, 1)) == 1
    (directory / names.entry_path(1)).write_text("{}")
    assert dropped(store, 1) == []


def test_who_has_an_old_entry_in_hand_finds_what_there_is_now(directory: Path) -> None:
    store = LocalStore(directory)
    tail = read_tail(store)
    opened = tail.state
    small = msgspec.structs.replace(opened, active=opened.active[-3:], preserved=())
    Hand(store, tail, "test").write("claim", small, OLD)
    shutil.rmtree(directory / names.PAGES)
    assert tail.state.active == small.active
    assert tail.readable() == (tail.state, ())


# ---- writing ------------------------------------------------------------------------------------------------------------


def test_a_page_is_put_once_and_again_if_it_is_the_same(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    records = tuple(put_manifest(store, number, new_attempt()) for number in (1, 2, 3))
    ref = write_page(store, f"e1-{'a' * 32}", "active", records)
    assert write_page(store, ref.id, "active", records) == ref
    assert read_page(store, ref) == records
    with pytest.raises(StorageError, match="other content"):
        write_page(store, ref.id, "active", records[:2])


def test_an_entry_by_hand_needs_no_page_if_none_can_be_written(directory: Path) -> None:
    store = LocalStore(directory)
    tail = read_tail(store)
    state = tail.state

    class NoPages:
        def fault(self, call: Call) -> Fault | None:
            return Fault.BEFORE if call.operation == "put_if_absent" and call.path.startswith(names.PAGES) else None

    entry = Hand(FaultyStore(store, NoPages()), tail, "test").write("claim", state, OLD)
    assert entry.state == state
    assert readable(store, read_tail(store).head) == (state, ())
