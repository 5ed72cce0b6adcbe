"""The programs of docs/coming-from-dcp.md do what the page says, word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from tests.support.warm import ROOT

PAGE = (ROOT / "docs" / "coming-from-dcp.md").read_text()
WITH_DCP, WITH_A_MANAGER = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_program_of_dcp_saves_and_resumes_and_a_manager_goes_on(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    names: dict[str, Any] = {"__name__": "page"}
    exec(WITH_DCP.replace("/shared/run-7", str(tmp_path)), names)  # noqa: S102
    names["save"](model, optimizer, 100)
    again, other = trained(2)
    assert names["load"](again, other) == 100
    assert torch.equal(again.weight, model.weight)
    assert distckpt.load(tmp_path, "progress") == {"step": 100}

    third, last = trained(3)
    seen = []
    names = {"distckpt": distckpt, "model": third, "optimizer": last, "train_step": lambda: seen.append(1)}
    exec(WITH_A_MANAGER.replace("/shared/run-7", str(tmp_path)), names)  # noqa: S102
    assert len(seen) == 200
    assert torch.equal(third.weight, model.weight)
    assert [distckpt.load(tmp_path / f"ckpt-{number}", "progress.step") for number in (200, 300)] == [200, 300]


def trained(seed: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return model, optimizer
