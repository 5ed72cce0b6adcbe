"""A job of several ranks as one worker."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import torch

from distckpt.directory.groups import read_groups
from distckpt.directory.reports import read_reports
from distckpt.storage import open_store
from tests.support.checkpoints import append_state, write_checkpoint
from tests.support.gang import free_port
from tests.support.warm import ROOT, start_script

PROGRAM = ROOT / "tests" / "ranks" / "programs" / "evaluates.py"


def test_a_job_with_a_mesh_of_its_own_restores_what_other_ranks_saved_and_is_one_worker(tmp_path: Path) -> None:
    for number in (1, 2):
        write_checkpoint(tmp_path, number, {"model": {"weight": torch.full((4, 6), float(number))}}, ranks=3)
    store = open_store(tmp_path)
    append_state(store, lambda state: msgspec.structs.replace(state, ended=True), kind="end")
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        start_script(PROGRAM, tmp_path, env={**os.environ, **told, "RANK": "0"}) as first,
        start_script(PROGRAM, tmp_path, env={**os.environ, **told, "RANK": "1"}) as second,
    ):
        assert first.stdout.read().splitlines() == ["1 2 24", "2 2 48"]
        assert (first.wait(), second.wait()) == (0, 0)
    assert (read_groups(store)["eval"].acknowledged, read_groups(store)["eval"].claims) == (2, ())
    assert [dict(each.report.metrics) for each in read_reports(store).found] == [{"sum": 24.0}, {"sum": 48.0}]
