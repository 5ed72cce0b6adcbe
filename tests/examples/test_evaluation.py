"""A trainer and three workers, each a process: one is killed at work, and the clock of one is a day behind."""

from __future__ import annotations

from pathlib import Path

import distckpt
from distckpt.directory.groups import read_groups
from distckpt.directory.log import read_tail
from distckpt.directory.reports import read_reports
from distckpt.storage import open_store
from tests.support.warm import ROOT, WarmProcess, start_script, warm

EVALUATION = ROOT / "examples" / "evaluation.py"
STEPS = 12


def worker(directory: Path, name: str, seconds: float, behind: float = 0.0) -> WarmProcess:
    """One that takes so long for each."""
    arguments = ["evaluate", "--directory", directory, "--worker", name, "--seconds", seconds, "--lease-seconds", 4]
    argv = [str(EVALUATION), *map(str, arguments)]
    return warm().start("support.clock:be_script_elsewhen", {"argv": argv, "seconds": -behind})


def evaluated(said: str) -> list[int]:
    """The numbers of what was acknowledged."""
    return [int(line.split()[1].rstrip(":")) for line in said.splitlines() if line.startswith("done")]


def test_every_checkpoint_is_evaluated_and_acknowledged_once(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    distckpt.watch(
        directory, group="evaluation", mode="all", on_lag="hold"
    )  # so that it is there before training begins
    with (
        worker(directory, "doomed", 30) as doomed,
        worker(directory, "late", 0.1, behind=86400) as late,
        worker(directory, "punctual", 0.1) as punctual,
        start_script(EVALUATION, "train", "--directory", directory, "--steps", STEPS, "--seconds", 0.1) as trainer,
    ):
        assert doomed.stdout.readline().startswith("begin")
        doomed.kill()
        assert trainer.wait(60) == 0
        assert (late.wait(60), punctual.wait(60)) == (0, 0)
        done = [evaluated(process.stdout.read()) for process in (doomed, late, punctual)]
    assert sorted(number for numbers in done for number in numbers) == list(range(1, STEPS + 1))
    assert done[0] == []
    store = open_store(directory)
    state = read_groups(store)["evaluation"]
    assert (state.acknowledged, state.claims, state.returned, state.set_aside) == (STEPS, (), (), ())
    assert (state.missed, state.skipped) == (0, 0)
    reported = {each.report.attempt for each in read_reports(store).found}
    assert {record.attempt for record in read_tail(store).state.alive().values() if not record.metrics} <= reported
