"""The programs of docs/coming-from-dcp.md do what the page says, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distckpt
from tests.support.comparing import same
from tests.support.snippets import play


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_program_of_dcp_saves_and_resumes_and_a_manager_goes_on(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for names in (play("docs/coming-from-dcp.md", 0, {}, tmp_path), play("docs/coming-from-dcp.md", 1, {}, tmp_path)):
        names["save"](model, optimizer, 100)
        again, other = trained(2)
        assert names["load"](again, other) == 100
        assert torch.equal(again.weight, model.weight)
        assert same(other.state_dict(), optimizer.state_dict())
    assert distckpt.load(tmp_path / "run-7", "progress") == {"step": 100}

    third, last = trained(3)
    seen = []
    names = {"distckpt": distckpt, "model": third, "optimizer": last, "train_step": lambda: seen.append(1)}
    play("docs/coming-from-dcp.md", 2, names, tmp_path)
    assert len(seen) == 200
    assert torch.equal(third.weight, model.weight)
    assert [distckpt.load(tmp_path / f"run-7/ckpt-{number}", "progress.step") for number in (200, 300)] == [200, 300]


def trained(seed: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return model, optimizer
