"""The examples do what they say: train, stop, resume, and be evaluated from outside, in one process each."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from tests.support.warm import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: object) -> str:
    """Run an example in a process of its own and return what it printed."""
    done = run_script(EXAMPLES / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps, saved at 2 and 4, its events and its digests."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "digests").mkdir()
    run("train.py", *options(folder), "--steps", 4)
    return folder


def options(folder: Path) -> list[object]:
    told = ["--events", folder / "events.jsonl", "--digests", folder / "digests"]
    return ["--directory", folder / "run", "--save-every", 2, *told]


def test_training_commits_its_checkpoints_and_tells_of_every_step(trained: Path) -> None:
    with distckpt.open(trained / "run") as newest:
        assert newest.path == str(trained / "run" / "ckpt-4")
        assert newest.verify().good
        assert newest.value("progress.step") == 4
        assert newest.value("loader@0.taken") == 4 * 12
    steps = [event for event in lines(trained / "events.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps][:4] == [1, 2, 3, 4]
    assert steps[3]["loss"] < steps[0]["loss"]


def test_training_resumes_bit_for_bit(trained: Path) -> None:
    run("train.py", *options(trained), "--steps", 5)
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
    run("evaluate.py", "--directory", trained / "run", "--until", 4, "--samples", 4, "--out", found)
    [evaluation] = lines(found)
    saved = json.loads((trained / "digests" / "saved-4-on-1.json").read_text())["tensors"]
    assert evaluation["checkpoint"] == str(trained / "run" / "ckpt-4")
    assert 2.0 < evaluation["loss"] < 6.0
    assert evaluation["tensors"] == {key: value for key, value in saved.items() if key.startswith("model.")}


def test_another_number_of_ranks_takes_the_samples_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    gpt = importlib.import_module("gpt")
    text = torch.arange(256, dtype=torch.uint8).repeat(20)

    def taken(loaders: list[Any]) -> list[tuple[int, ...]]:
        return sorted(tuple(sample.tolist()) for loader in loaders for sample in next(iter(loader))[0])

    alone = gpt.Loader(text, context=16, batch=12, rank=0, world_size=1)
    expected = [taken([alone]) for _ in range(4)]
    two = [gpt.Loader(text, 16, 6, rank, 2) for rank in range(2)]
    found = [taken(two) for _ in range(2)]
    three = [gpt.Loader(text, 16, 4, rank, 3) for rank in range(3)]
    for rank, loader in enumerate(three):
        loader.load_state_dict(gpt.share_anew([one.state_dict() for one in two], rank, 3))
    found += [taken(three) for _ in range(2)]
    assert found == expected


def test_the_demo_notices_a_single_other_bit(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
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
