"""What the demo is made of tells the truth: what ranks write down, what the evaluation reads, and what is compared."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.warm import ROOT, run_script

DEMO = ROOT / "demo"


def run(script: str, *arguments: object) -> None:
    """Run a script of the demo as the demo does."""
    done = run_script(DEMO / script, *arguments, env={**os.environ, "PYTHONPATH": str(ROOT / "examples")})
    assert done.returncode == 0, done.stderr


def train(folder: Path, steps: int) -> None:
    told = ["--events", folder / "events.jsonl", "--digests", folder / "digests"]
    run("training.py", "--directory", folder / "run", "--save-every", 2, "--steps", steps, *told)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps, saved at 2 and 4, its events and its digests."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "digests").mkdir()
    train(folder, steps=4)
    return folder


def test_the_ranks_tell_of_every_step_and_of_every_save(trained: Path) -> None:
    events = lines(trained / "events.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert [(event["step"], event["samples"]) for event in steps][:4] == [(1, 12), (2, 24), (3, 36), (4, 48)]
    assert steps[3]["loss"] < steps[0]["loss"]
    for kind in ("saved", "decided"):
        assert sorted(event["step"] for event in events if event["event"] == kind) == [2, 4]


def test_training_resumes_bit_for_bit(trained: Path) -> None:
    train(trained, steps=5)
    events = lines(trained / "events.jsonl")
    resumed = [event for event in events if event["event"] == "started"][-1]
    assert resumed["restored"] == str(trained / "run" / "ckpt-4")
    assert [event["step"] for event in events if event["event"] == "step"][-1] == 5
    before, after = (
        json.loads((trained / "digests" / f"{name}-4-on-1.json").read_text()) for name in ("saved", "restored")
    )
    assert len(before["tensors"]) > 100
    assert before == after


def test_evaluation_reads_the_very_weights_that_were_saved(trained: Path) -> None:
    found = trained / "evaluations.jsonl"
    run("evaluation.py", "--directory", trained / "run", "--until", 4, "--samples", 4, "--out", found)
    [evaluation] = lines(found)
    saved = json.loads((trained / "digests" / "saved-4-on-1.json").read_text())["tensors"]
    assert evaluation["checkpoint"] == str(trained / "run" / "ckpt-4")
    assert 2.0 < evaluation["loss"] < 6.0
    assert evaluation["tensors"] == {key: value for key, value in saved.items() if key.startswith("model.")}


def test_a_single_other_bit_is_noticed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    checks, record = importlib.import_module("checks"), importlib.import_module("record")
    commit = record.Commit(str(trained / "run" / "ckpt-2"), 2, 1, 0, 0.0, 0.0)
    (tmp_path / "digests").mkdir()
    name = "saved-2-on-1.json"
    digests = json.loads((trained / "digests" / name).read_text())
    (tmp_path / "digests" / name).write_text(json.dumps(digests))
    seen = record.Record(tmp_path, str(trained / "run"))
    assert checks.read_again(seen, commit) == checks.Reading(len(digests["tensors"]), ())

    digests["tensors"]["model.norm.bias"] = checks.digest(torch.ones(192))
    (tmp_path / "digests" / name).write_text(json.dumps(digests))
    reading = checks.read_again(seen, commit)
    assert reading.differing == ("model.norm.bias",)
    assert not checks.check_readings("", [reading]).holds
