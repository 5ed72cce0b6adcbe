"""G9: what goes into a checkpoint comes out of it, exactly as torch would restore it, or is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import distckpt
from distckpt.errors import DistckptError
from tests.state.zoo import ENTRIES, Entry
from tests.state.zoo.entry import take_steps
from tests.state.zoo.roundtrip import SAVE_SECONDS, round_trip, round_trip_together
from tests.state.zoo.values import OUTGROWN

pytestmark = [
    pytest.mark.timeout(30),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torch's DataLoader's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's own
]

CARRIED = [entry for entry in ENTRIES.values() if entry.refused is None]
LONELY = [entry for entry in CARRIED if entry.section in ("checkpoint", "packages") or entry.kind == OUTGROWN]
"""Those that look at the checkpoint that they are in, or do not bear that others train in between."""
SOCIABLE = [entry for entry in CARRIED if entry not in LONELY]
REFUSED = [entry for entry in ENTRIES.values() if entry.refused is not None]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("section", sorted({entry.section for entry in SOCIABLE}))
def test_all_of_a_section_comes_back_out_of_one_checkpoint(section: str, tmp_path: Path) -> None:
    together = [entry for entry in SOCIABLE if entry.section == section]
    assert round_trip_together(together, str(tmp_path)) == []


@pytest.mark.wide(5)
@pytest.mark.parametrize("entry", SOCIABLE, ids=lambda entry: entry.name)
def test_it_comes_back_as_torch_would_restore_it_and_training_goes_on(entry: Entry, tmp_path: Path) -> None:
    assert round_trip(entry, str(tmp_path)) == []


@pytest.mark.parametrize("entry", LONELY, ids=lambda entry: entry.name)
def test_what_is_about_its_checkpoint_comes_back_likewise(entry: Entry, tmp_path: Path) -> None:
    assert round_trip(entry, str(tmp_path)) == []


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_it_is_refused_by_name_before_anything_is_written(entry: Entry, tmp_path: Path) -> None:
    assert entry.refused is not None
    run = entry.start(seed=0)
    take_steps(run, 0, entry.steps)
    with distckpt.CheckpointManager(run.checkpoint, tmp_path) as manager:
        for first in (manager.prepare, lambda: manager.save(1).result(SAVE_SECONDS)):
            with pytest.raises(DistckptError) as caught:
                first()
            assert entry.refused.key in str(caught.value)
            assert re.search(entry.refused.advice, str(caught.value))
    assert distckpt.latest_checkpoint(tmp_path) is None
