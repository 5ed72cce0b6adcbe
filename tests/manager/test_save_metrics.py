"""Metrics that are known when a checkpoint is saved: committed with it, and judged like what is reported later."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import BestN, LatestN
from tests.support.gang import Gang
from tests.support.small_runs import Trainer, numbers, until


def metrics(path: str) -> dict[str, float]:
    with distckpt.open(path) as reader:
        return dict(reader.metrics)


def test_the_best_stays_by_what_it_was_saved_with(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: torch.tensor(1.0), 3: 2.0, 4: 5.0, 5: 4.0}
    with Trainer(tmp_path, keep=BestN(1, "loss", "min") | LatestN(1), buffers=2) as trainer:
        for number, loss in losses.items():
            trainer.manager.save(number, metrics={"loss": loss})
        trainer.manager.wait()
        assert until(lambda: numbers(tmp_path) == [2, 5])
    assert metrics(f"{tmp_path}/ckpt-2") == {"loss": 1.0}


def test_a_report_that_comes_later_counts_more(tmp_path: Path) -> None:
    with Trainer(tmp_path) as trainer:
        trainer.manager.save(1, metrics={"loss": 3.0, "steps": 10})
        trainer.manager.wait()
    with distckpt.open(f"{tmp_path}/ckpt-1") as reader:
        reader.report({"loss": 2.0})
        assert reader.metrics == {"loss": 2.0, "steps": 10.0}


def test_a_loss_that_is_no_number_any_more_costs_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Trainer(tmp_path) as trainer, caplog.at_level(logging.WARNING):
        trainer.manager.save(1, metrics={"loss": math.nan, "top1": 0.5})
        trainer.manager.wait()
    assert "the metric 'loss' is nan, and is left out" in caplog.text
    assert metrics(f"{tmp_path}/ckpt-1") == {"top1": 0.5}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"loss": "low"}, TypeError), ([1.0], TypeError), ({"": 1.0}, ValueError), (dict.fromkeys(map(str, range(65)), 1), ValueError)],
)  # fmt: skip
def test_what_is_no_metric_is_refused(tmp_path: Path, wrong: object, error: type[Exception]) -> None:
    with Trainer(tmp_path) as trainer:
        with pytest.raises(error):
            trainer.manager.save(1, metrics=wrong)  # type: ignore[arg-type]
        trainer.saved(1)
    assert metrics(f"{tmp_path}/ckpt-1") == {}


def test_of_many_ranks_those_of_the_first_count_and_all_hear_of_wrong_ones(tmp_path: Path, gang2: Gang) -> None:
    first, second = gang2.run("ranks.steps:save_with_metrics", directory=str(tmp_path))
    assert first == ["saved", "TypeError: metric 'loss' must be one number", "saved"]
    assert (second[0], second[2]) == ("saved", "saved")
    assert "metric 'loss' must be one number" in second[1]
    assert metrics(f"{tmp_path}/ckpt-1") == {"loss": 0.0}
    assert numbers(tmp_path) == [1, 3]
