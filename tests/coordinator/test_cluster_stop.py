"""Stops and errors that reach every rank: real processes, a real coordinator actor."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt import Coordinator, LooperThread
from distckpt.coordinator.messages import AwaitStop, StopReport, StopState
from distckpt.errors import (
    CoordinatorError,
    FencedError,
    OutOfRangeError,
    PeerFailedError,
    RankSilentError,
    StaleRunError,
)
from distckpt.storage import LocalStore
from tests.support.actors import coordinator_pid
from tests.support.gang import ROOT, Gang, run_script_on_ranks
from tests.support.small_runs import until
from tests.support.warm import run_script

pytestmark = pytest.mark.timeout(120)

HOST = socket.gethostname()


@pytest.fixture
def two(gang2: Gang, tmp_path: Path) -> Iterator[Gang]:
    """Two ranks with a Coordinator each."""
    gang2.run("ranks.stop:begin", directory=str(tmp_path))
    yield gang2
    gang2.run("ranks.stop:end")


def stop(gang: Gang, rank: int, error: str = "") -> list[Any]:
    """All ranks stop because of one; what their join raises."""
    began = time.monotonic()
    for result in gang.run("ranks.stop:stop", rank=rank, error=error):
        assert not result["before"]
        assert result["stopped"]
        assert result["at"] - began < 30
    return gang.run("ranks.stop:join")


# ---- many ranks -----------------------------------------------------------------------------------------------------------


def test_a_stop_an_error_and_the_end_of_the_input_reach_all_ranks(two: Gang) -> None:
    assert stop(two, 1) == [{"raised": ""}] * 2

    assert two.run("ranks.stop:clear") == [{"stopped": False, "joined": False}] * 2
    other, own = stop(two, 1, "value")
    assert own == {"raised": "ValueError", "text": "of rank 1"}
    assert other["raised"] == "PeerFailedError"
    assert other["text"] == f"rank 1 ({HOST}) failed with ValueError: of rank 1"
    assert (other["rank"], other["host"], other["kind"], other["reason"]) == (1, HOST, "ValueError", "of rank 1")
    assert "Traceback" in other["traceback_text"]
    assert "in _fail" in other["traceback_text"]

    two.run("ranks.stop:clear")
    assert stop(two, 0, "odd") == [{"raised": ""}] * 2, "a subclass of a clean type"

    two.run("ranks.stop:renew")
    own, other = stop(two, 0, "key")
    assert own["raised"] == "KeyError"
    assert other["raised"] == "PeerFailedError"
    assert (other["rank"], other["kind"]) == (0, "KeyError")


def test_the_first_of_two_errors_is_everyones(two: Gang) -> None:
    own, other = two.run("ranks.stop:stop_everywhere", first=0)
    assert own == {"raised": "ValueError", "text": "of rank 0"}
    assert (other["raised"], other["rank"], other["kind"]) == ("PeerFailedError", 0, "ValueError")
    assert other["context"], "its own error is still to be seen"


def test_a_late_report_of_before_clear_stop_is_dropped(two: Gang) -> None:
    stop(two, 1, "value")
    assert two.run("ranks.stop:report_late", rank=1) == [{"stopped": False}] * 2
    assert [result["raised"] for result in stop(two, 0, "key")] == ["KeyError", "PeerFailedError"]


def test_an_error_that_leaves_the_managers_block_reaches_the_others(two: Gang) -> None:
    other, own = two.run("ranks.stop:fail_in_the_manager", rank=1)
    assert own["raised"] == "ValueError"
    assert (other["raised"], other["rank"], other["reason"]) == ("PeerFailedError", 1, "in the loop")


def test_a_rank_that_has_left_is_not_missed(gang2: Gang, tmp_path: Path) -> None:
    gang2.run("ranks.stop:begin", directory=str(tmp_path), silence_timeout=2.0)
    assert gang2.run("ranks.stop:leave", rank=1, seconds=4.0) == [{"stopped": False}] * 2
    gang2.run("ranks.stop:end")


@pytest.mark.usefixtures("connected")
def test_a_coordinator_that_is_killed_forgets_nothing(two: Gang, tmp_path: Path) -> None:
    os.kill(coordinator_pid(str(tmp_path)), signal.SIGKILL)
    assert [result["raised"] for result in stop(two, 1, "value")] == ["PeerFailedError", "ValueError"]
    two.run("ranks.stop:clear")
    two.start("ranks.stop:stop", rank=0, error="key")
    os.kill(coordinator_pid(str(tmp_path)), signal.SIGKILL)
    assert [two.result(rank)["stopped"] for rank in range(2)] == [True, True]
    assert [result["raised"] for result in two.run("ranks.stop:join")] == ["KeyError", "PeerFailedError"]


@pytest.mark.usefixtures("connected")
def test_a_rank_that_is_killed_and_the_coordinator_with_it(ray_address: str, tmp_path: Path) -> None:
    with Gang(2, {"RAY_ADDRESS": ray_address}) as gang:
        gang.run("ranks.stop:begin", directory=str(tmp_path), silence_timeout=2.0)
        time.sleep(1.2)  # until all know of each other
        gang.start("ranks.stop:silent", rank=1, seconds=60)
        gang.processes[1].wait(30)
        os.kill(coordinator_pid(str(tmp_path)), signal.SIGKILL)
        told = gang.result(0)
        gang.start("ranks.stop:join")
        raised = gang.result(0)
        assert told["stopped"]
        assert told["after"] < 30
        assert (raised["raised"], raised["rank"], raised["host"]) == ("RankSilentError", 1, HOST)
        assert 2.0 <= raised["seconds"] < 30


def test_a_stop_is_told_and_not_looked_for(two: Gang) -> None:
    """It takes milliseconds, but for where other tests have the cores."""
    results = two.run("ranks.stop:latencies", count=10)
    assert results[1]["median"] < 5000


# ---- one rank, the coordinator in the process ----------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[distckpt.CheckpointManager]:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), tmp_path) as made:
        yield made


def test_one_rank_is_a_cluster_too(manager: distckpt.CheckpointManager) -> None:
    coord = Coordinator(cluster=manager.cluster, silence_timeout=1.5)
    ticks: list[int] = []
    LooperThread.loop(coord, 0.01, lambda: ticks.append(1))
    assert not coord.wait_for_stop(2.5), "it gives signs of life"
    assert ticks
    coord.request_stop(ValueError("alone"))
    with pytest.raises(ValueError, match="alone"):
        coord.join()
    coord.clear_stop()
    assert not coord.wait_for_stop(0.1)
    assert manager.save(1).result(30)
    over = threading.Event()
    idle = threading.Thread(target=over.wait, name="idle", daemon=True)
    idle.start()
    coord.request_stop()
    with pytest.raises(RuntimeError, match=r"still running on rank 0: idle$"):
        coord.join([idle], stop_grace_period_secs=0)
    over.set()


def report(rank: int, error: type[BaseException] | None = None) -> StopReport:
    kinds = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in error.__mro__) if error else ()
    return StopReport(rank, "far", error.__name__ if error else "", kinds, "said so")


def tell(manager: distckpt.CheckpointManager, coord: Coordinator, stop: StopReport) -> None:
    """Another rank's report comes to the coordinator."""
    membership: Any = coord._membership
    manager._client.ask(AwaitStop(membership._generation, stop, {}, 60.0, 0.0), 30)


def hear(manager: distckpt.CheckpointManager, coord: Coordinator, stop: StopReport) -> None:
    """And from there to ``coord``."""
    tell(manager, coord, stop)
    assert coord.wait_for_stop(30)


class SequenceError(OutOfRangeError):
    """A clean type by its base."""


@pytest.mark.parametrize(
    ("types", "error", "clean"),
    [
        (None, SequenceError, True),
        (None, ValueError, False),
        ([LookupError], KeyError, True),
        ([], OutOfRangeError, False),
        ([], None, True),
    ],
)
def test_clean_types_are_recognized_by_name(
    manager: distckpt.CheckpointManager, types: Any, error: type[Exception] | None, clean: bool
) -> None:
    coord = Coordinator(types, cluster=manager.cluster)
    hear(manager, coord, report(1, error))
    assert coord.should_stop()
    if clean:
        coord.join()
    else:
        with pytest.raises(PeerFailedError, match=r"rank 1 \(far\) failed with"):
            coord.join()


def test_a_plain_stop_elsewhere_takes_no_error_away(manager: distckpt.CheckpointManager) -> None:
    coord = Coordinator(cluster=manager.cluster)
    with coord._lock:  # what it hears waits until this block ends
        tell(manager, coord, report(1))
        coord.request_stop(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        coord.join()


def test_silence_is_told_to_the_silent_one_too(manager: distckpt.CheckpointManager) -> None:
    coord = Coordinator(cluster=manager.cluster)
    hear(manager, coord, StopReport(0, "here", "RankSilentError", silent=61.5))
    with pytest.raises(RankSilentError, match=r"rank 0 \(here\) gave no sign of life for 61\.5 s") as caught:
        coord.join()
    assert caught.value.seconds == 61.5


def test_what_is_heard_after_the_join_does_not_change_what_it_raised(
    manager: distckpt.CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    coord = Coordinator(cluster=manager.cluster)
    coord.join()
    assert not coord.should_stop()
    hear(manager, coord, report(1, ValueError))
    assert until(lambda: "an error after everyone was joined: PeerFailedError: rank 1 (far)" in caplog.text)
    coord.join()


def test_the_whole_traceback_is_printed_where_python_can(capsys: pytest.CaptureFixture[str]) -> None:
    error = PeerFailedError(3, "far", "ValueError", "bad", "Traceback of there\nValueError: bad\n")
    sys.excepthook(type(error), error, None)
    printed = capsys.readouterr().err
    assert "rank 3 (far) failed with ValueError: bad" in printed
    assert ("Traceback of there" in printed) == (sys.version_info >= (3, 11))


@pytest.mark.parametrize("error", [PeerFailedError(3, "far", "E", "bad", "trace"), RankSilentError(3, "far", 4.5)])
def test_errors_of_peers_travel(error: PeerFailedError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert isinstance(again, CoordinatorError)


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say")


def test_an_error_without_a_text_is_told_all_the_same(manager: distckpt.CheckpointManager) -> None:
    coord = Coordinator(cluster=manager.cluster)
    coord.request_stop(SilentError())
    membership: Any = coord._membership
    assert membership.settle(30)
    assert membership._known.kind == "SilentError"
    assert membership._known.reason == "(its text cannot be had: RuntimeError)"
    with pytest.raises(SilentError):
        coord.join()


def test_several_coordinators_of_one_cluster_do_not_stop_each_other(manager: distckpt.CheckpointManager) -> None:
    one, two = (Coordinator(cluster=manager.cluster) for _ in range(2))
    one.request_stop(ValueError("one"))
    with pytest.raises(ValueError, match="one"):
        one.join()
    assert not two.wait_for_stop(0.1)
    two.request_stop()
    two.join()


def stop_of(manager: distckpt.CheckpointManager, generation: int) -> StopReport | None:
    """What the coordinator would tell another rank."""
    reply = manager._client.ask(AwaitStop(generation, None, {}, None, 0.0), 30)
    assert isinstance(reply, StopState)
    return reply.stop


@pytest.mark.parametrize("how", ["cleared", "dropped"])
def test_what_was_reported_is_told_even_if_nobody_waits_for_it(manager: distckpt.CheckpointManager, how: str) -> None:
    coord = Coordinator(cluster=manager.cluster)
    coord.request_stop(ValueError("gone at once"))
    if how == "cleared":
        coord.clear_stop()
        assert not coord.should_stop()
    del coord
    assert until(lambda: stop_of(manager, 1) is not None)
    assert stop_of(manager, 2) is None


def stop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("distckpt-stops", "distckpt-report")]


def test_a_dropped_coordinator_leaves_and_its_thread_ends(manager: distckpt.CheckpointManager) -> None:
    coord = Coordinator(cluster=manager.cluster, silence_timeout=1.0)
    assert stop_threads()
    del coord
    assert until(lambda: not stop_threads())


def test_a_closed_manager_ends_the_cluster(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), tmp_path) as manager:
        coord = Coordinator(cluster=manager.cluster)
    assert until(lambda: not stop_threads())
    assert not coord.should_stop()
    coord.request_stop(ValueError("later"))
    with pytest.raises(ValueError, match="later"):
        coord.join()
    assert until(lambda: not stop_threads())
    with pytest.raises(CoordinatorError, match="has been closed"):
        Coordinator(cluster=manager.cluster)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_rank_of_a_run_that_is_over_stops(tmp_path: Path) -> None:
    """Nobody would tell it of a stop any more."""
    checkpoint = distckpt.Checkpoint(a=torch.ones(2))
    old = distckpt.CheckpointManager(checkpoint, tmp_path)
    coord = Coordinator(cluster=old.cluster, silence_timeout=1.5)
    with distckpt.CheckpointManager(checkpoint, tmp_path):
        assert old.save(1).exception(30) is not None
        assert coord.wait_for_stop(30)
        with pytest.raises((FencedError, StaleRunError)):
            coord.join()
        old.close()


def test_a_coordinator_that_cannot_be_reached_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), tmp_path)
    manager._client.close()
    coord = Coordinator(cluster=manager.cluster, silence_timeout=0.2)
    assert not coord.wait_for_stop(2.5)
    assert caplog.text.count("rank 0 cannot hear of stops") == 1, "it is said once"
    manager.close()


# ---- distckpt's own threads -----------------------------------------------------------------------------------------------


def own_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if isinstance(thread, LooperThread))


def test_a_managers_background_work_runs_in_loopers_that_end_with_it(tmp_path: Path) -> None:
    before = own_threads()
    with distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), tmp_path, buffers=2) as manager:
        assert own_threads() == sorted(
            [*before, *("distckpt-heartbeat", "distckpt-save-0", "distckpt-save-1", "distckpt-stats")]
        )
        for number in range(1, 6):
            manager.save(number)
    assert own_threads() == before
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-5"


def test_a_straggler_of_a_manager_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distckpt.manager.CLOSE_SECONDS", 0.1)
    over = threading.Event()
    manager = distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), tmp_path)
    stuck = LooperThread.loop(manager._background, None, over.wait, args=(30,), name="distckpt-stuck")
    manager.save(1)
    manager.close()
    over.set()
    stuck.join(10)
    assert not stuck.is_alive()
    assert "threads still running: distckpt-stuck" in caplog.text
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-1"


def test_a_save_in_flight_outlives_the_block_that_an_error_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends the program closes the manager once more, and that waits for the save."""
    before = own_threads()
    go, put = threading.Event(), LocalStore.put_unique
    monkeypatch.setattr(LocalStore, "put_unique", lambda *args: go.wait(30) and put(*args))
    monkeypatch.setattr("distckpt.manager.LAST_SAVE_SECONDS", 0.1)
    manager = distckpt.CheckpointManager(distckpt.Checkpoint(a=torch.ones(2)), tmp_path)

    def training() -> None:
        with manager:
            manager.save(1)
            raise ValueError("in the loop")

    with pytest.raises(ValueError, match="in the loop"):
        training()
    assert distckpt.latest_checkpoint(tmp_path) is None
    with pytest.raises(CoordinatorError, match="closed"):
        manager.save(2)
    threading.Timer(0.1, go.set).start()
    manager.close()
    assert distckpt.latest_checkpoint(tmp_path) == f"{tmp_path}/ckpt-1"
    assert own_threads() == before


# ---- the example ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(150)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_stops_all_ranks_and_says_why(ray_address: str, tmp_path: Path, ranks: int) -> None:
    script, env = ROOT / "examples" / "cluster_stop.py", {"RAY_ADDRESS": ray_address}
    if ranks == 1:
        done = [run_script(script, "--directory", tmp_path, env={**os.environ, **env, "OMP_NUM_THREADS": "1"})]
    else:
        done = run_script_on_ranks(ranks, script, "--directory", tmp_path, env=env)
    assert [each.returncode for each in done] == [0] * ranks, done
    lines = [line for each in done for line in each.stdout.splitlines() if "stopped" in line]
    assert len(lines) == ranks, done
    failing = ranks - 1
    for line in lines:
        assert "ValueError" in line
        if not line.startswith(f"rank {failing}:"):
            assert f"rank {failing} ({HOST})" in line
            assert float(line.partition("after ")[2].partition(" s")[0]) > 0
