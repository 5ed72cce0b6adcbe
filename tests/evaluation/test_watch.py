from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import distckpt
from distckpt.directory.groups import read_groups
from distckpt.directory.log import read_tail
from distckpt.directory.reports import read_reports
from distckpt.errors import (
    ClaimLostError,
    DamagedError,
    GroupMismatchError,
    LeaseLostError,
    LogMissingError,
)
from distckpt.format import names
from distckpt.format.json.group import GroupState
from distckpt.format.json.log import State
from distckpt.storage import MemoryStore, open_store
from distckpt.testing.faulty import Call, Fault, FaultOn, FaultyStore, NoFaults, RandomFaults
from tests.support.checkpoints import append_state, commit_bare, write_checkpoint
from tests.support.small_runs import files, mount, mounting, until
from tests.support.warm import ROOT

WORKER = """
import sys, distckpt
for checkpoint in distckpt.watch(sys.argv[1], group="eval", mode="all", lease_seconds=1.0):
    print(checkpoint.number, checkpoint.delivery, flush=True)
    sys.stdin.readline()
    checkpoint.ack()
"""


def watch(directory: object, **options: Any) -> distckpt.Watch:
    """What is there now, for one group that wants each."""
    return distckpt.watch(directory, **{"group": "eval", "mode": "all", "timeout": 0, "backoff": 0, **options})  # type: ignore[arg-type]


def state_of(directory: object, group: str = "eval") -> GroupState:
    return read_groups(open_store(directory))[group]  # type: ignore[arg-type]


def begin(directory: object) -> None:
    """What comes before the first save: the directory is claimed in its log."""
    append_state(open_store(directory), lambda state: state, kind="claim")  # type: ignore[arg-type]


def end(directory: object) -> None:
    """The run says that training is over."""
    append_state(open_store(directory), lambda state: msgspec.structs.replace(state, ended=True), kind="end")  # type: ignore[arg-type]


def retire(directory: object, *numbers: int) -> None:
    """What retention does first."""

    def change(state: State) -> State:
        gone = tuple(record for record in state.active if record.number in numbers)
        active = tuple(record for record in state.active if record not in gone)
        return msgspec.structs.replace(state, active=active, retiring=gone)

    append_state(open_store(directory), change, kind="retire")  # type: ignore[arg-type]


def leases(directory: Path) -> list[str]:
    return [path for path in files(directory) if path.startswith(names.LEASES)]


# ---- without a group ----------------------------------------------------------------------------------------------


def test_a_reader_on_its_own_gets_the_newest_each_time_under_a_lease(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    checkpoints = distckpt.watch(tmp_path, timeout=0)
    with next(checkpoints) as checkpoint:
        assert (checkpoint.path, checkpoint.number, checkpoint.delivery) == (f"{tmp_path}/ckpt-2", 2, 1)
        assert len(leases(tmp_path)) == 1
    assert leases(tmp_path) == []
    commit_bare(tmp_path, 2)  # the same number again is another checkpoint
    assert next(checkpoints).number == 2
    commit_bare(tmp_path, 4)
    assert next(checkpoints).number == 4
    assert len(leases(tmp_path)) == 1, "that of the one before is gone"
    assert list(checkpoints) == []
    checkpoints.close()
    assert leases(tmp_path) == []
    assert not (tmp_path / names.GROUPS).exists()


def test_it_ends_when_the_run_is_over_and_not_when_it_has_crashed(tmp_path: Path) -> None:
    asked = []
    commit_bare(tmp_path, 1)
    assert [
        each.number for each in distckpt.watch(tmp_path, timeout=0, timeout_fn=lambda: asked.append(1) or True)
    ] == [1]
    assert asked == [1]
    end(tmp_path)
    assert [each.number for each in distckpt.watch(tmp_path)] == [1]


def test_the_state_is_read_whole_and_restored_in_place(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    write_checkpoint(tmp_path, 1, {"model": {"weight": weight}, "step": 7}, ranks=2)
    model = torch.nn.Linear(3, 4, bias=False)
    for checkpoint in distckpt.watch(tmp_path, timeout=0):
        with checkpoint, checkpoint.open() as reader:
            assert reader.value("step") == 7
            assert torch.equal(checkpoint.load("model")["weight"], weight)
            assert checkpoint.restore(distckpt.Checkpoint(model=model), partial=True).missing == ()
    assert torch.equal(model.weight, weight)
    with pytest.raises(ValueError, match="was acknowledged"):
        checkpoint.load()


def test_what_is_read_and_reported_is_the_attempt_that_was_given_out(tmp_path: Path) -> None:
    """Whatever else is at its path by then."""
    said: list[tuple[int, object]] = []
    write_checkpoint(tmp_path, 1, {"step": 1})
    checkpoint = next(watch(tmp_path, on_report=lambda which, metrics: said.append((which.number, dict(metrics)))))
    write_checkpoint(tmp_path, 1, {"step": 2})
    assert checkpoint.load() == {"step": 1}
    checkpoint.report({"loss": 1.5})
    [reported] = read_reports(open_store(tmp_path)).found
    assert (reported.report.attempt, reported.report.metrics) == (checkpoint.attempt, {"loss": 1.5})
    assert reported.report.reporter.partition(":")[0] != ""
    assert said == [(1, {"loss": 1.5})]
    checkpoint.ack()


# ---- how a delivery ends ------------------------------------------------------------------------------------------


def test_leaving_the_block_says_what_became_of_it(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    with pytest.raises(ValueError, match="no"), next(watch(tmp_path, max_attempts=2)):
        raise ValueError("no good")
    [back] = state_of(tmp_path).returned
    assert (back.deliveries, back.failures, back.error) == (1, 1, "ValueError: no good")
    with pytest.raises(KeyboardInterrupt), next(watch(tmp_path)) as checkpoint:
        raise KeyboardInterrupt
    [back] = state_of(tmp_path).returned
    assert (checkpoint.delivery, back.deliveries, back.failures, back.error) == (2, 1, 1, "")
    with pytest.raises(DamagedError), next(watch(tmp_path)) as checkpoint:
        checkpoint.load()
    [aside] = state_of(tmp_path).set_aside
    assert (aside.deliveries, aside.failures, aside.error[:12]) == (2, 2, "DamagedError")
    assert (list(watch(tmp_path)), leases(tmp_path)) == ([], [])
    commit_bare(tmp_path, 2)
    with next(watch(tmp_path)):
        pass
    state = state_of(tmp_path)
    assert (state.acknowledged, state.claims, state.returned) == (1, (), ())
    assert state.last_acknowledged is not None
    assert state.last_acknowledged.number == 2


class Speechless(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError


def test_an_error_is_taken_as_it_is_and_never_keeps_the_checkpoint(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    next(watch(tmp_path)).reject(ValueError("no good"))
    assert [back.error for back in state_of(tmp_path).returned] == ["ValueError: no good"]
    with pytest.raises(Speechless), next(watch(tmp_path)):
        raise Speechless
    assert [(back.failures, back.error) for back in state_of(tmp_path).returned] == [(2, "Speechless")]
    assert leases(tmp_path) == []


def test_what_was_given_back_comes_after_its_backoff(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    checkpoints = watch(tmp_path, backoff=0.3, timeout=20)
    next(checkpoints).release()
    with next(checkpoints) as other:
        assert other.number == 2
    with next(checkpoints) as again:
        assert (again.number, again.delivery) == (1, 2)


def test_what_is_released_again_and_again_rests_each_time(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    checkpoints = watch(tmp_path, backoff=0.3, timeout=20)
    began = time.monotonic()
    for _ in range(4):
        next(checkpoints).release()
    with next(checkpoints):
        assert time.monotonic() - began >= 0.3 + 3 * 0.6
    assert state_of(tmp_path).acknowledged == 1


@pytest.mark.parametrize("group", ["eval", None])
def test_a_reader_that_is_used_after_its_block_says_so_at_once(tmp_path: Path, group: str | None) -> None:
    write_checkpoint(tmp_path, 1, {"step": 1})
    with next(distckpt.watch(tmp_path, group=group, timeout=0)) as checkpoint:
        reader = checkpoint.open()
        assert reader.load() == {"step": 1}
    for use in (reader.load, lambda: reader.value("step"), reader.verify, checkpoint.load, checkpoint.check):
        with pytest.raises(ValueError, match="ckpt-1 was acknowledged, so nothing keeps it from being deleted"):
            use()


def test_it_is_settled_once(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    with next(watch(tmp_path)) as checkpoint:
        checkpoint.ack()
        checkpoint.reject("too late to say so")
    assert (state_of(tmp_path).acknowledged, state_of(tmp_path).returned) == (1, ())


def test_one_that_is_not_settled_must_be_before_the_next(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    checkpoints = watch(tmp_path)
    next(checkpoints)
    with pytest.raises(RuntimeError, match="max_in_flight is 1"):
        next(checkpoints)
    checkpoints.close()
    assert (len(state_of(tmp_path).returned), leases(tmp_path)) == (1, [])


def test_with_more_in_flight_the_next_is_waited_for_until_one_is_settled(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        commit_bare(tmp_path, number)
    checkpoints = watch(tmp_path, max_in_flight=2)
    first, second = next(checkpoints), next(checkpoints)
    found: list[distckpt.WatchedCheckpoint] = []
    asking = threading.Thread(target=lambda: found.append(next(checkpoints)))
    asking.start()
    second.ack()
    asking.join()
    assert [first.number, second.number, found[0].number] == [1, 2, 3]
    checkpoints.close()
    assert sorted(item.number for item in state_of(tmp_path).returned) == [1, 3]


# ---- groups -------------------------------------------------------------------------------------------------------


class StandsStill(MemoryStore):
    """Whoever writes below ``folder`` stands still once, right after that, while ``others`` go on."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.others: Callable[[], object] = lambda: None

    def put_if_absent(self, path: str, data: bytes) -> None:
        """See Store."""
        super().put_if_absent(path, data)
        self._stand_still(path)

    def replace(self, path: str, data: bytes) -> None:
        """See Store."""
        super().replace(path, data)
        self._stand_still(path)

    def _stand_still(self, path: str) -> None:
        if path.startswith(self.folder):
            others, self.others = self.others, lambda: None
            others()


@pytest.mark.parametrize("group", [None, "eval"])
def test_what_retires_while_it_is_taken_is_followed_by_the_next_at_once(group: str | None) -> None:
    """Also for a watch that waits for nothing: there was something to be had all the time."""
    store = StandsStill(names.LEASES)
    with mounting():
        place = mount(store)
        commit_bare(place, 1)
        checkpoints = watch(place, group=group, mode="all" if group else None, backoff=0)

        def go_on() -> None:
            commit_bare(place, 2)
            retire(place, 1)

        store.others = go_on
        assert next(checkpoints).number == 2


def test_a_worker_that_stood_still_while_others_went_on_far_has_what_it_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is left of the chain by which it could tell that its entry was followed, but the claim in the newest."""
    monkeypatch.setattr("distckpt.directory.groups.KEEP_ENTRIES", 1)
    monkeypatch.setattr("distckpt.directory.groups.PRUNE_EVERY", 1)
    store = StandsStill(names.GROUPS)
    with mounting():
        place = mount(store)
        for number in range(1, 6):
            commit_bare(place, number)
        slow, quick = watch(place, worker="slow"), watch(place, worker="quick")

        def go_on() -> None:
            for _ in range(3):
                next(quick).ack()

        store.others = go_on
        first = next(slow)
        assert (first.number, first.delivery) == (1, 1)
        first.ack()
        assert [first.ack(), next(slow).number] == [None, 5]


def test_in_order_all_of_them_and_again_none_after_a_restart_days_later(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        commit_bare(tmp_path, number)
    seen = []
    for checkpoint in watch(tmp_path):
        with checkpoint:
            seen.append(checkpoint.number)
    commit_bare(tmp_path, 4)
    seen += [checkpoint.number for checkpoint in watch(tmp_path) if checkpoint.ack() is None]
    end(tmp_path)
    assert list(distckpt.watch(tmp_path, group="eval")) == []
    assert seen == [1, 2, 3, 4]


def test_groups_do_not_disturb_each_other(tmp_path: Path) -> None:
    for number in (1, 2):
        commit_bare(tmp_path, number)
    for group, mode, expected in (("a", "all", [1, 2]), ("b", "latest", [2]), ("c", "all", [1, 2])):
        seen = []
        for checkpoint in watch(tmp_path, group=group, mode=mode):
            with checkpoint:
                seen.append(checkpoint.number)
        assert seen == expected


@pytest.mark.parametrize("kind", ["local", "memory", "faulty"])
def test_workers_share_the_work_and_each_checkpoint_is_acknowledged_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.directory.groups.PAUSES", (0.0,) * 9)
    monkeypatch.setattr("distckpt.storage.patience.PAUSES", (0.0, 0.0, 0.01))
    total, store, done = 15, MemoryStore(), list[tuple[str, int]]()
    kinds = (Fault.NO_ANSWER, Fault.LOST_ANSWER, Fault.LOST_ANSWER_AS_REFUSAL, Fault.REFUSED, Fault.LATE)

    class OnGroups:
        def __init__(self, seed: int) -> None:
            self.faults = RandomFaults(seed, 0.15, kinds)

        def fault(self, call: Call) -> Fault | None:
            return self.faults.fault(call) if call.path.startswith(f"{names.GROUPS}/") else None

    with mounting():
        places: list[object] = [tmp_path] * 3
        if kind != "local":
            script = [OnGroups(seed) if kind == "faulty" else NoFaults() for seed in range(3)]
            places = [mount(FaultyStore(store, each)) for each in script]

        def work(name: str, place: object) -> None:
            for checkpoint in distckpt.watch(place, group="eval", mode="all", worker=name, timeout=60, backoff=0):  # type: ignore[arg-type]
                with checkpoint:
                    if checkpoint.number % 5 == 0 and checkpoint.delivery == 1:
                        checkpoint.release()
                    else:
                        done.append((name, checkpoint.number))

        begin(places[0] if kind == "local" else mount(store))
        workers = [threading.Thread(target=work, args=(f"w{at}", place)) for at, place in enumerate(places)]
        for worker in workers:
            worker.start()
        place = places[0] if kind == "local" else mount(store)
        for number in range(total):
            commit_bare(place, number)  # type: ignore[arg-type]
        end(place)
        for worker in workers:
            worker.join()
        assert sorted(number for _, number in done) == list(range(total))
        state = state_of(place)
        assert (state.acknowledged, state.claims, state.returned, state.set_aside) == (total, (), (), ())
        assert (state.missed, state.skipped) == (0, 0)


def test_the_checkpoint_of_a_worker_that_was_killed_goes_to_another(tmp_path: Path) -> None:
    commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline().split() == ["1", "1"]
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline().split() == ["2", "1"]
        worker.send_signal(signal.SIGKILL)
    [claim] = state_of(tmp_path).claims
    assert (claim.number, claim.seconds) == (2, 1.0)
    with next(watch(tmp_path, timeout=60)) as checkpoint:
        assert (checkpoint.number, checkpoint.delivery) == (2, 2)
    state = state_of(tmp_path)
    assert (state.acknowledged, state.claims, state.set_aside) == (2, (), ())


def test_a_worker_that_was_cut_off_reads_no_more_and_its_acknowledgement_does_not_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"step": 1})
    with mounting():
        cut = FaultyStore(open_store(tmp_path))
        late = next(watch(mount(cut), lease_seconds=1.0))
        assert late.load() == {"step": 1}
        cut.script = FaultsOnLeases()
        other = next(watch(tmp_path, timeout=60))
        assert (other.number, other.delivery) == (1, 2)
        with pytest.raises(LeaseLostError):
            late.load()
        other.ack()
        with pytest.raises(ClaimLostError, match="delivery 1"):
            late.ack()
    assert state_of(tmp_path).acknowledged == 1


class FaultsOnLeases:
    """No lease can be renewed."""

    def fault(self, call: Call) -> Fault | None:
        return FaultOn("replace", Fault.BEFORE, names.LEASES, call.nth).fault(call)


def is_lost(checkpoint: distckpt.WatchedCheckpoint) -> bool:
    try:
        checkpoint.check()
    except LeaseLostError:
        return True
    return False


def test_a_lease_that_was_lost_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"step": 1})
    with mounting():
        cut = FaultyStore(open_store(tmp_path))
        checkpoint = next(watch(mount(cut), lease_seconds=1.5))
        cut.script = FaultsOnLeases()
        assert until(lambda: is_lost(checkpoint))
        with pytest.raises(LeaseLostError), checkpoint:
            checkpoint.check()
    [back] = state_of(tmp_path).returned
    assert (back.failures, back.deliveries) == (0, 1)


def test_settings_that_are_no_group_s_or_make_no_sense_are_refused(tmp_path: Path) -> None:
    watch(tmp_path, max_backlog=3, on_lag="hold")
    assert state_of(tmp_path).max_backlog == 3
    with pytest.raises(GroupMismatchError, match="max_backlog is 3 and not 4"):
        watch(tmp_path, max_backlog=4)
    distckpt.watch(tmp_path, group="eval")
    nonsense: list[dict[str, Any]] = [
        {"group": "../eval"},
        {"group": "a/b"},
        {"group": None},
        {"group": None, "mode": None, "max_attempts": 1},
        {"mode": "each"},
        {"on_lag": "wait"},
        {"start": "now"},
        {"lease_seconds": 0},
        {"lease_seconds": 90000},
        {"backoff": -1},
        {"max_in_flight": 0},
        {"max_attempts": 0},
        {"max_backlog": -1},
        {"worker": "a\nb"},
        {"worker": "x" * 257},
        {"worker": 5},
    ]
    for options in nonsense:
        with pytest.raises(ValueError, match=r"."):
            watch(tmp_path, **options)


def test_what_ends_its_workers_is_set_aside_also_while_another_one_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.directory.sharing.MAX_DELIVERIES", 2)
    commit_bare(tmp_path, 1)
    commit_bare(tmp_path, 2)
    next(watch(tmp_path, backoff=1000)).release()
    dying = [watch(tmp_path, worker=worker) for worker in ("bob", "carol")]
    for worker in dying:
        next(worker)
        for lease in leases(tmp_path):
            (tmp_path / lease).unlink()
    assert list(watch(tmp_path)) == []
    state = state_of(tmp_path)
    assert [(item.number, item.deliveries) for item in state.set_aside] == [(2, 2)]
    assert [item.number for item in state.returned] == [1]


def test_a_group_may_be_there_before_the_run(tmp_path: Path) -> None:
    checkpoints = watch(tmp_path / "run", timeout=60)
    begin(tmp_path / "run")
    number = threading.Timer(0.1, lambda: commit_bare(tmp_path / "run", 5))
    number.start()
    with next(checkpoints) as checkpoint:
        assert checkpoint.number == 5
    number.join()


def test_checkpoints_without_a_log_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {"step": 1})
    for path in (tmp_path / names.LOG).iterdir():
        path.unlink()
    with pytest.raises(LogMissingError):
        next(distckpt.watch(tmp_path, timeout=0))


def test_a_look_without_news_costs_two_listings_however_old_the_run(tmp_path: Path) -> None:
    with mounting():
        store = FaultyStore(MemoryStore())
        place = mount(store)
        costs = []
        for total in (3, 80):
            for number in range(total):
                commit_bare(place, number)
            for checkpoint in watch(place):
                checkpoint.ack()
            assert read_tail(store).seq >= total
            checkpoints = distckpt.watch(place, group="eval", timeout=0)
            assert list(checkpoints) == []
            checkpoints = distckpt.watch(place, group="eval", timeout=0.05)
            before = len(store.calls)
            assert list(checkpoints) == []
            calls = [(call.operation, call.path) for call in store.calls[before:]]
            costs.append(calls[:2])
            of_the_log = {("stat", names.entry_path(seq)) for seq in (read_tail(store).seq, read_tail(store).seq + 1)}
            assert set(calls) <= {("list", "_groups/eval"), ("list", "_log"), *of_the_log}
        assert costs[0] == costs[1] == [("list", "_groups/eval"), ("list", "_log")]


def test_what_a_group_writes_is_bounded() -> None:
    store = MemoryStore.named("bounded-group")
    for number in range(50):
        commit_bare(store.url, number)
        for checkpoint in watch(store.url):
            checkpoint.ack()
    entries = sorted(path for path in store.objects if path.startswith(names.GROUPS))
    assert len(entries) <= 64 + 16 + 1
    newest = store.objects[entries[-1]].data
    assert (json.loads(newest)["state"]["acknowledged"], len(newest) < 1000) == (50, True)
