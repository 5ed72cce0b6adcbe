"""What was saved below an optimizer's key and its loading would drop is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import distckpt
from distckpt.errors import MismatchError
from tests.support.comparing import same

EMA = {"optimizer.ema.decay", "optimizer.ema.w"}


class More(optim.AdamW):
    """Gives more than torch's own loading takes."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ema": {"decay": 0.9, "w": torch.ones(3)}}


class Taking(optim.AdamW):
    """Takes all that is there."""

    extra: Any = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.extra = state_dict.pop("ema", None)
        super().load_state_dict(state_dict)


def built(kind: type[optim.AdamW], lr: float = 0.1) -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), lr=lr)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_what_an_optimizer_has_no_place_for_is_unexpected(tmp_path: Path) -> None:
    saved, there = built(More), built(optim.AdamW, 9.0)
    with distckpt.CheckpointManager(distckpt.Checkpoint(**saved), tmp_path) as manager:
        manager.save(1).result(30)
    with distckpt.CheckpointManager(distckpt.Checkpoint(**there), tmp_path) as manager:
        with pytest.raises(MismatchError) as caught:
            manager.restore_or_initialize()
        assert set(caught.value.unexpected) == EMA
        assert there["optimizer"].param_groups[0]["lr"] == 9.0
        manager.restore(1, partial=True)
    status = distckpt.Checkpoint(**there).restore(tmp_path)
    assert (set(status.unexpected), status.missing) == (EMA, ())
    assert same(there["optimizer"].state_dict(), optim.AdamW.state_dict(saved["optimizer"]))
    with pytest.raises(MismatchError, match=r"in no object: optimizer\.ema\.w$"):
        distckpt.Checkpoint(**there).restore(tmp_path, select="optimizer.ema.w")


def test_what_an_optimizer_gives_itself_or_its_own_code_may_take_is_expected(tmp_path: Path) -> None:
    path = distckpt.Checkpoint(**built(More)).save(tmp_path / "saved")
    distckpt.Checkpoint(**built(More)).restore(path).assert_consumed()
    taking, hooked, seen = built(Taking), built(optim.AdamW), []
    distckpt.Checkpoint(**taking).restore(path).assert_consumed()
    hooked["optimizer"].register_load_state_dict_pre_hook(lambda _, state: seen.append(state["ema"]))
    distckpt.Checkpoint(**hooked).restore(path).assert_consumed()
    assert all(same(found, {"decay": 0.9, "w": torch.ones(3)}) for found in (taking["optimizer"].extra, *seen))
    assert len(seen) == 1
    told = built(optim.AdamW)
    told["optimizer"].register_load_state_dict_post_hook(lambda _: None)
    assert set(distckpt.Checkpoint(**told).restore(path).unexpected) == EMA


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_an_optimizer_that_dcp_saved_flat_is_told_as_such(tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = get_state_dict(*built(optim.AdamW).values(), options=options)
    dcp.save({"model": model, "optimizer": optimizer}, storage_writer=distckpt.dcp.Writer(tmp_path, 1))
    there = built(optim.AdamW, 9.0)
    with distckpt.CheckpointManager(distckpt.Checkpoint(**there), tmp_path) as manager:
        with pytest.raises(MismatchError, match=r"optimizer \(it was saved flat, as by .*save it without") as caught:
            manager.restore_or_initialize()
        assert set(caught.value.missing) == {"optimizer.state", "optimizer.param_groups"}
        assert set(caught.value.unexpected) == {f"optimizer.{name}" for name in optimizer}
        manager.restore(partial=True)
        assert manager.restore_status is not None
        assert set(manager.restore_status.unexpected) == {f"optimizer.{name}" for name in optimizer}
    assert same(there["model"].state_dict(), model)
    assert there["optimizer"].param_groups[0]["lr"] == 9.0
    model_alone = distckpt.Checkpoint(**there).restore(tmp_path, select="model")
    assert model_alone.is_complete, model_alone
