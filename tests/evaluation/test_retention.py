"""A group and the retention of the run that it follows."""

from __future__ import annotations

import threading
from pathlib import Path

import distckpt
from distckpt.directory.groups import read_groups
from distckpt.storage import open_store
from tests.support.small_runs import Trainer, assert_loads, holds, numbers


def test_none_is_missed_while_a_run_that_keeps_one_goes_on_and_each_is_whole(tmp_path: Path) -> None:
    total, done, lock = 24, list[int](), threading.Lock()
    distckpt.watch(tmp_path, group="eval", mode="all", on_lag="hold", max_backlog=2)

    def evaluate() -> None:
        for checkpoint in distckpt.watch(tmp_path, group="eval", backoff=0):
            with checkpoint:
                if checkpoint.number % 7 == 0 and checkpoint.delivery == 1:
                    checkpoint.release()
                    continue
                assert holds(checkpoint.load("state"), checkpoint.number)
                checkpoint.report({"number": checkpoint.number})
                with lock:
                    done.append(checkpoint.number)

    workers = [threading.Thread(target=evaluate) for _ in range(2)]
    trainer = Trainer(tmp_path, max_to_keep=1)
    for worker in workers:
        worker.start()
    for number in range(1, total + 1):
        trainer.saved(number)
    trainer.manager.close(final=True)
    for worker in workers:
        worker.join()
    state = read_groups(open_store(tmp_path))["eval"]
    assert sorted(done) == list(range(1, total + 1))
    assert (state.acknowledged, state.skipped, state.missed, state.set_aside) == (total, 0, 0, ())


def test_what_a_group_is_too_slow_for_is_skipped_and_said(tmp_path: Path) -> None:
    checkpoints = distckpt.watch(tmp_path, group="eval", mode="all", on_lag="skip", max_backlog=2, timeout=0)
    with Trainer(tmp_path, max_to_keep=1) as trainer:
        for number in range(1, 11):
            trainer.saved(number)
        trainer.manager.wait()
        held = next(checkpoints)
        for number in range(11, 15):
            trainer.saved(number)
        trainer.manager.wait()
        assert_loads(held.path, held.number)
        held.ack()
        seen = []
        for checkpoint in checkpoints:
            with checkpoint:
                seen.append(checkpoint.number)
    state = read_groups(open_store(tmp_path))["eval"]
    assert (held.number, seen[-1], state.missed) == (held.number, 14, 0)
    assert state.acknowledged + state.skipped == 14
    assert len(seen) <= 3
    assert numbers(tmp_path)[-1] == 14
