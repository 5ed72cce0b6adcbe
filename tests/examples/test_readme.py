"""The program that README begins with does what README says, word for word, in a bucket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distckpt
from tests.support import servers
from tests.support.snippets import snippets
from tests.support.warm import ROOT, run_script

TRAINING, EVALUATION, *_ = snippets("README.md")

BEFORE = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
progress, total = {"step": 0}, 300

class Loader:
    def state_dict(self):
        return {"at": progress["step"]}
    def load_state_dict(self, state):
        assert state == {"at": 300}

loader = Loader()

def train_step():
    optimizer.zero_grad()
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    scheduler.step()
"""

EVALUATED = """
import distckpt, torch
model = torch.nn.Linear(4, 4)

def evaluate(model):
    print(checkpoint.path, float(model.weight.sum()))
    return 1.0
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a process that finds README's bucket."""
    with servers.fake_gcs() as server:
        server.make_bucket("bucket")
        yield {**os.environ, "STORAGE_EMULATOR_HOST": server.url, "PYTHONPATH": str(ROOT)}


@pytest.mark.timeout(700)
def test_the_programs_of_the_readme(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text(BEFORE + TRAINING)
    subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=300)
    again = run_script(script, env=environment, timeout=300)  # it restores what the first has saved
    assert again.returncode == 0, again.stderr
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", environment["STORAGE_EMULATOR_HOST"])
    assert distckpt.latest_checkpoint("gs://bucket/run-7") == "gs://bucket/run-7/ckpt-300"
    script.write_text(EVALUATED + EVALUATION)
    done = run_script(script, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    evaluated = re.findall(r"^gs://bucket/run-7/(\S+) -?\d", done.stdout, re.MULTILINE)
    assert evaluated == ["ckpt-100", "ckpt-200", "ckpt-300"]
