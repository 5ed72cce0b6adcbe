"""Less than everything on several ranks, and on another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gang import Gang

pytestmark = pytest.mark.timeout(180)

FROZEN = ("0.weight", "0.bias", "0.weight.momentum", "0.bias.momentum")


@pytest.fixture
def gang1(ray_address: str) -> Iterator[Gang]:
    with Gang(1, {"RAY_ADDRESS": ray_address}) as gang:
        yield gang


def test_what_two_ranks_leave_out_stays_on_any_number_of_ranks(gang1: Gang, gang2: Gang, tmp_path: Path) -> None:
    saved = gang2.run("ranks.less:save", directory=str(tmp_path))
    first, second, third = saved[0]["keys"]
    assert first == second
    assert {key for key in first if key.startswith(("model", "optimizer.state"))} == {
        f"{where}.1.{name}" for where in ("model", "optimizer.state") for name in ("weight", "bias")
    } - {"optimizer.state.1.weight", "optimizer.state.1.bias"} | {
        f"optimizer.state.1.{name}.momentum_buffer" for name in ("weight", "bias")
    }
    assert set(third) - set(second) == {"model.0.bias", "optimizer.state.0.bias.momentum_buffer"}
    assert not [key for key in third if key.startswith("average") or "cache" in key]
    for gang in (gang2, gang1):
        for which, stays in ((2, FROZEN), (3, ("0.weight", "0.weight.momentum"))):
            for found in gang.run("ranks.less:restore", directory=str(tmp_path), which=which):
                before, after = found["before"], found["after"]
                assert (found["missing"], found["unexpected"]) == ([], [])
                assert after == {
                    key: before[key] if key in (*stays, "cache") else saved[0]["facts"][key] for key in after
                }


def test_ranks_leave_out_the_same_and_nothing_that_no_rank_has(gang2: Gang, tmp_path: Path) -> None:
    for typo, apart, spread in gang2.run("ranks.less:refusals", directory=str(tmp_path)):
        assert "exclude='modle'" in typo
        assert "did you mean 'model'" in typo
        assert "rank 0 says exclude=['model.1'], only_trainable=False, and rank 1 exclude=['model.0']" in apart
        assert spread == "all"
