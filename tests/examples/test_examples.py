"""The examples do what they say: train, stop, resume, and be evaluated from outside, in one process each."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from tests.support.warm import ROOT, run_script

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object) -> str:
    """Run an example in a process of its own and return what it printed."""
    done = run_script(EXAMPLES / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run of four steps, saved at 2 and 4, and what was printed."""
    directory = tmp_path_factory.mktemp("example") / "run"
    return directory, run("train.py", "--directory", directory, "--save-every", 2, "--steps", 4)


def test_training_commits_its_checkpoints_and_tells_of_every_step(trained: tuple[Path, str]) -> None:
    directory, said = trained
    with distckpt.open(directory) as newest:
        assert newest.path == str(directory / "ckpt-4")
        assert newest.verify().good
        assert newest.value("progress.step") == 4
        assert newest.value("loader@0.taken") == 4 * 12
    losses = losses_of(said)
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[1]


def test_training_goes_on_where_it_was_saved(trained: tuple[Path, str]) -> None:
    directory, _ = trained
    assert list(losses_of(run("train.py", "--directory", directory, "--save-every", 2, "--steps", 5))) == [5]


def test_evaluation_finds_what_training_has_saved(trained: tuple[Path, str]) -> None:
    directory, _ = trained
    said = run("evaluate.py", "--directory", directory, "--until", 4, "--samples", 4)
    path, _, loss = said.strip().rpartition(": loss ")
    assert path == str(directory / "ckpt-4")
    assert 2.0 < float(loss) < 6.0


def losses_of(said: str) -> dict[int, float]:
    """The loss of each step."""
    told = (line.removeprefix("step ").split(": loss ") for line in said.splitlines())
    return {int(step): float(loss) for step, loss in told}


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
